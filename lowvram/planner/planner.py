"""From a request and a budget to a plan: of all ways that fit, the fastest. No torch.

See `choices.py` for the search, `streaming.py` and `options.py` for what it chooses from, `laws.py`
for what everything holds, `seconds.py` for how long it takes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from lowvram.conversation import PromptShape
from lowvram.offload import Budget, Placement, format_size, host_memory
from lowvram.planner.allowed import OPTIONS, check_options, options_of
from lowvram.planner.choices import ENDLESS, MODULES, Choice, Choices
from lowvram.planner.device import (
    DeviceFacts,
    DtypeChoice,
    decide_budget,
    probe_device,
    resolve_dtype,
)
from lowvram.planner.gains import cheaper, minimum_budget
from lowvram.planner.host import copies_bytes, moved_per_pass, source_for, waiting_bytes
from lowvram.planner.model import ModelFacts, PartSizes
from lowvram.planner.options import ANY, Limits
from lowvram.planner.plan import Plan
from lowvram.planner.question import Kernel, Question
from lowvram.planner.reasons import reasons
from lowvram.planner.recording import with_recordings
from lowvram.planner.rows import moved_bytes, phase_rows
from lowvram.planner.streaming import Cut, Source
from lowvram.settings import GenerationSettings
from lowvram.tensors import Part


def plan_request(
    model: ModelFacts,
    shape: PromptShape,
    settings: GenerationSettings,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_memory: str | int | float | None = None,
    allow: Sequence[str] = (),
) -> Plan:
    """The plan for a request on a device that need not be opened, nor even be present.

    Without a budget it gets what is free on the device; on one that is not there, what it takes
    for everything to stay.

    Raises:
        UsageError: an unknown device, type, option or size; a prompt beyond the model's window.
    """
    facts = probe_device(device)
    chosen = resolve_dtype(dtype, model.stored_dtype, facts, packed=bool(model.packed))

    def plan(budget: Budget, on_device: frozenset[str] = frozenset()) -> Plan:
        return make_plan(
            model,
            shape,
            settings,
            facts=facts,
            budget=budget,
            dtype=chosen,
            allow=allow,
            on_device=on_device,
        )

    if max_memory is not None or facts.free_bytes is not None or facts.type == "meta":
        return plan(decide_budget(max_memory, facts))
    every = plan(decide_budget(ENDLESS, facts), frozenset(MODULES))
    enough = minimum_budget(every.predicted_peak_bytes)
    found = plan(decide_budget(enough, facts))
    why = (
        f"no budget was given and {facts.name} is not here to be asked: planned for "
        f"{format_size(enough)}, with which everything stays"
    )
    return replace(found, reasons=(*found.reasons, why))


def make_plan(
    model: ModelFacts,
    shape: PromptShape,
    settings: GenerationSettings,
    *,
    facts: DeviceFacts,
    budget: Budget,
    dtype: DtypeChoice,
    allow: Sequence[str] = (),
    on_device: frozenset[str] = frozenset(),
    made_with: Collection[str] | None = None,
    kernel: Kernel = "auto",
    host_free: int | None = None,
    limits: Limits = ANY,
    kept_bytes: int = 0,
    modulated: bool = False,
) -> Plan:
    """The plan for a request within `budget`; `fits` is False where none does.

    `kernel`: `reference` plans for packed linears that are computed by de-quantizing, everywhere.
    `on_device` are the modules that an earlier request left there, `made_with` the options they
    were built with (by default those of this plan); the plan keeps those that this one does not
    use, as far as they fit. `host_free` are the bytes of host memory that may be used (what is
    free), `limits` what may be chosen for the Thinker. `kept_bytes` are what an earlier request
    left on the host; `modulated` says that with it the vocoder's passing weights need not be read.

    Raises:
        UsageError: an unknown option; a prompt beyond the model's window.
    """
    check_options(allow)
    question = Question(
        model=model,
        shape=shape,
        settings=settings.completed(model.generation),
        facts=facts,
        dtype=dtype,
        allow=tuple(allow),
        kernel=kernel,
        kept_bytes=kept_bytes,
        modulated=modulated,
    )
    question.check()
    free = host_memory()[1] if host_free is None else host_free
    first: Source = "file" if facts.type == "cpu" else "pinned"
    ways = [_Way(way, first, on_device, made_with) for way in question.ways()]
    needed = [minimum_budget(way.choices.smallest(limits)) for way in ways]
    minimum = min(needed)
    fitting = [way for way, need in zip(ways, needed, strict=True) if need <= budget.budget_bytes]
    way = fitting[0] if fitting else ways[needed.index(minimum)]
    question, choices, on_device = way.question, way.choices, way.there
    room = budget.budget_bytes - budget.guard_bytes
    choice = _choose(choices, room, limits)
    source, why = source_for(
        facts.type, moved_per_pass(choice), waiting_bytes(choices.request, choice), free
    )
    if source != first:
        choices = Choices(choices.request, facts, source, way.kept)
        choice = _choose(choices, room, limits)
    told = phase_rows(choices, choice, on_device)
    rows, recorded, recording = with_recordings(facts.type, choices.request, choice, told, room)
    return Plan(
        fits=budget.budget_bytes >= minimum,
        model=model.name,
        device=facts.name,
        dtype=dtype.name,
        budget_bytes=budget.budget_bytes,
        context_bytes=facts.context_bytes,
        guard_bytes=budget.guard_bytes,
        predicted_peak_bytes=max(row.predicted_peak_bytes for row in rows),
        minimum_budget_bytes=minimum,
        phases=rows,
        residency=_residency(choices, choice),
        bytes_to_move=moved_bytes(choices, choice, on_device),
        reasons=(*reasons(question, choices, choice, rows, budget, minimum, why), *recording),
        knobs={} if budget.budget_bytes >= minimum else cheaper(question, minimum),
        placements=_placements(choices, choice),
        chunks={part: option.chunk for part, option in choice.options.items()},
        kv={KV_NAMES[part]: option.kv for part, option in choice.options.items()},
        prompt_tokens=shape.tokens,
        host_bytes=copies_bytes(choice, choices.source) + waiting_bytes(choices.request, choice),
        used=tuple(name for name in OPTIONS if name in question.used),
        recorded=recorded,
    )


class _Way:
    """The choices there are with some of the allowed options in effect; `there` are modules on the
    device that are built with just these, `kept` the same in the order of the phases."""

    def __init__(
        self,
        question: Question,
        source: Source,
        on_device: frozenset[str],
        made_with: Collection[str] | None,
    ) -> None:
        self.question = question
        before = question.used if made_with is None else made_with
        self.there = frozenset(
            part
            for part in on_device
            if options_of(part, before) == options_of(part, question.used)
        )
        self.kept = [part for part in MODULES if part in self.there]
        self.choices = Choices(question.request(), question.facts, source, self.kept)


KV_NAMES: dict[Part, str] = {"text": "thinker", "talker": "talker"}


def _choose(choices: Choices, room: int, limits: Limits) -> Choice:
    """The best for that room; where nothing fits, the best of what needs the least."""
    choice = choices.best(room, limits) or choices.best(choices.smallest(limits), limits)
    assert choice is not None
    return choice


def _placements(choices: Choices, choice: Choice) -> dict[str, Placement]:
    found = {p: o.cut.placement(choices.source) for p, o in choice.options.items()}
    return {part: placement for part, placement in found.items() if placement is not None}


def _residency(choices: Choices, choice: Choice) -> dict[str, str]:
    where = {"embed": "host"}
    for module in MODULES:
        option = choice.options.get(module)
        if module in choice.resident:
            where[module] = "resident"
        elif option is not None and option.cut.streamed:
            where[module] = _streamed(choices.request.sizes[module], option.cut)
        else:
            where[module] = "on demand" if module in choices.used else "unused"
    return where


def _streamed(sizes: PartSizes, cut: Cut) -> str:
    layers, pieces = sizes.layers, len(sizes.units) - sizes.layers
    said = f"streamed: {layers - cut.layers} of {layers} layers stay"
    return said + (f", {pieces - cut.pieces} of {pieces} pieces of its head" if pieces else "")
