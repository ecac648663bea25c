"""The plan of one request: what is on the device in each phase, and why. Printable, and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lowvram.offload import Placement, format_size

OWNERS = ("weights", "slabs", "kv", "carry", "activations", "workspace")
"""Who holds device memory. `carry` is what one phase leaves for the next."""

Bound = Literal["memory", "bus", "disk", "compute"]
"""What a phase waits for: the device's memory, the bus to it, the disk, or its arithmetic."""


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """One phase: what each owner holds at its peak, the modules it runs, and those on the device.

    `predicted_peak_bytes` includes the device's context and not the guard. `seconds`, what they
    are `bound` by, and `bytes_moved` to the device, loading included, are predictions from assumed
    speeds (see `planner/seconds.py`).
    """

    name: str
    predicted_peak_bytes: int
    parts: Mapping[str, int]
    modules: tuple[str, ...]
    on_device: tuple[str, ...]
    reason: str
    seconds: float = 0.0
    bound: Bound = "memory"
    bytes_moved: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a request needs and where each module will be.

    `residency` maps a module to `resident` (stays between requests), `on demand` (loaded when its
    phase begins, dropped when it ends), `streamed: n of m layers stay` (on demand as well, and its
    other layers come through slabs for every pass), `host` (its rows are read on the host) or
    `unused`. `placements` has what is streamed, part by part; `chunks` the prompt tokens that go
    through a decoder at a time ("text", "talker"); `kv` where keys and values wait ("thinker",
    "talker"). `host_bytes` is the host memory it takes besides the interpreter's: copies of
    streamed layers, keys and values, prompt embeddings and states. `knobs` has the smallest budget
    with each change that would need less, by flag; `used` the allowed options that are in effect;
    `recorded` the bytes that recorded decode steps take, by part ("text", "talker").
    `fits` means predicted peak + guard <= budget.
    """

    fits: bool
    model: str
    device: str
    dtype: str
    budget_bytes: int
    context_bytes: int
    guard_bytes: int
    predicted_peak_bytes: int
    minimum_budget_bytes: int
    phases: tuple[PhasePlan, ...]
    residency: Mapping[str, str]
    bytes_to_move: int
    reasons: tuple[str, ...]
    knobs: Mapping[str, int] = field(default_factory=dict)
    placements: Mapping[str, Placement] = field(default_factory=dict)
    chunks: Mapping[str, int] = field(default_factory=dict)
    kv: Mapping[str, Literal["device", "host"]] = field(default_factory=dict)
    host_bytes: int = 0
    prompt_tokens: int = 0
    used: tuple[str, ...] = ()
    recorded: Mapping[str, int] = field(default_factory=dict)

    def phase(self, name: str) -> PhasePlan:
        """The phase of that name; an interleaved one is named by its parts joined with `+`."""
        for row in self.phases:
            if row.name == name:
                return row
        raise KeyError(name)

    def interleaves(self, name: str, other: str) -> bool:
        """Whether two phases share a row: what they run is on the device at the same time."""
        return any({name, other} <= set(row.name.split("+")) for row in self.phases)

    def resident(self, part: str) -> bool:
        return self.residency.get(part) == "resident"

    def placement(self, part: str) -> Placement | None:
        """How the part's units are streamed; None where all of it is on the device while used."""
        return self.placements.get(part)

    @property
    def refusal(self) -> str:
        """Why the request does not fit, and what would: one line."""
        peak = max(self.phases, key=lambda row: row.predicted_peak_bytes)
        return (
            f"does not fit in {format_size(self.budget_bytes)}: {peak.name} needs "
            f"{format_size(peak.predicted_peak_bytes)} and a guard of "
            f"{format_size(self.guard_bytes)}; the smallest budget that would do is "
            f"{format_size(self.minimum_budget_bytes, round_up=True)}"
            + "".join(self._effect(knob, size) for knob, size in self.knobs.items())
        )

    def _effect(self, knob: str, size: int) -> str:
        saved = format_size(self.minimum_budget_bytes - size)
        return f"; with {knob} {format_size(size, round_up=True)} ({saved} less)"

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names above; bytes are integers."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.model} on {self.device}, {self.dtype}: "
            f"{'fits' if self.fits else 'does not fit'} in {format_size(self.budget_bytes)}; "
            f"peak {format_size(self.predicted_peak_bytes)} "
            f"and guard {format_size(self.guard_bytes)}",
            "",
        ]
        rows: list[tuple[str, ...]] = [("phase", "peak", *OWNERS, "on the device")]
        for phase in self.phases:
            held = (phase.parts.get(owner, 0) for owner in OWNERS)
            cells = (format_size(nbytes) if nbytes else "-" for nbytes in held)
            rows.append(
                (
                    phase.name,
                    format_size(phase.predicted_peak_bytes),
                    *cells,
                    ", ".join(phase.on_device),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        for row in rows:
            head = row[0].ljust(widths[0])
            numbers = "  ".join(
                cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:], strict=True)
            )
            lines.append(f"{head}  {numbers}  {row[-1]}")
        lines.append("")
        lines += [f"{part}: {where}" for part, where in self.residency.items()]
        lines.append("")
        lines += [f"- {reason}" for reason in self.reasons]
        return "\n".join(lines)
