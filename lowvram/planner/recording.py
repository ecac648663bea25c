"""Which decode steps will be recorded and replayed, and what that takes. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from lowvram.engine.spans import LONGEST, RECORDING, SWITCH, graph_bytes, in_place
from lowvram.offload import format_size
from lowvram.planner.choices import Choice
from lowvram.planner.laws import layer_bytes
from lowvram.planner.phases import Request
from lowvram.planner.plan import PhasePlan
from lowvram.tensors import Part

STEPS: Mapping[str, str] = {"text": "decode", "talker": "talk"}
"""The phase whose steps a part computes."""


class Recordings(NamedTuple):
    """The rows with what is recorded in them, its bytes by part, and a line for each part."""

    rows: tuple[PhasePlan, ...]
    taken: dict[str, int]
    reasons: tuple[str, ...]


def with_recordings(
    device_type: str, request: Request, choice: Choice, rows: Sequence[PhasePlan], room: int
) -> Recordings:
    """Record the steps of every part that can be, the Thinker's first, as far as each row stays
    within `room`, context included."""
    found = Recordings(tuple(rows), {}, ())
    for part in choice.options:
        if device_type in RECORDING and (part != "text" or request.settings.tokens > 1):
            found = _with(found, part, device_type, request, choice, room)
    return found


def _with(
    found: Recordings,
    part: Part,
    device_type: str,
    request: Request,
    choice: Choice,
    room: int,
) -> Recordings:
    place = next(i for i, row in enumerate(found.rows) if STEPS[part] in row.name.split("+"))
    row = found.rows[place]
    taken = _bytes(part, request)
    why = _refusal(part, device_type, request, choice)
    if not why and (left := room - row.predicted_peak_bytes) < taken:
        why = f"it takes {format_size(taken)}, the plan leaves {format_size(max(0, left))}"
    if why:
        said = f"{part}: steps are launched one by one, not recorded: {why}"
        return found._replace(reasons=(*found.reasons, said))
    fuller = replace(
        row,
        predicted_peak_bytes=row.predicted_peak_bytes + taken,
        parts={**row.parts, "workspace": row.parts["workspace"] + taken},
    )
    said = f"{part}: steps are recorded once and replayed ({format_size(taken)})"
    return Recordings(
        (*found.rows[:place], fuller, *found.rows[place + 1 :]),
        {**found.taken, part: taken},
        (*found.reasons, said),
    )


def _bytes(part: Part, request: Request) -> int:
    decoder = request.decoder(part)
    step = layer_bytes(decoder, 1, request.kv_tokens(part), request.itemsize, request.kernels)
    return graph_bytes(decoder.num_hidden_layers, step)


def _refusal(part: Part, device_type: str, request: Request, choice: Choice) -> str:
    """Why steps of the part cannot be recorded, room aside; empty if they can."""
    option = choice.options[part]
    if os.environ.get(SWITCH, "") == "0":
        return f"{SWITCH}=0"
    if option.cut.streamed:
        return "some of its layers stream"
    if option.kv == "host":
        return "its keys and values wait on the host"
    if not in_place(device_type, request.kv_tokens(part)):
        return f"{request.kv_tokens(part):,} keys are more than {LONGEST:,}"
    sizes = request.sizes[part]
    widens = request.widens and part == "talker" and sizes.rounded
    if widens or (request.unpacks and sizes.packed):
        return "rounded weights are made wide for every product"
    return ""
