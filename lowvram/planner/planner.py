"""From a request and a budget to a plan: which modules stay, and what each phase holds. No torch.

Among the choices that fit, the one that moves the fewest bytes in the next request wins; among
those, the one that vocodes while the Talker still draws codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from lowvram.conversation import PromptShape, check_window
from lowvram.errors import UsageError
from lowvram.offload import Budget, format_size, guard_bytes
from lowvram.planner.device import (
    DeviceFacts,
    DtypeChoice,
    decide_budget,
    probe_device,
    resolve_dtype,
)
from lowvram.planner.laws import PREFILL_CHUNK
from lowvram.planner.model import ModelFacts, PartSizes
from lowvram.planner.phases import ITEMSIZE, PhaseLoad, request_phases
from lowvram.planner.plan import PhasePlan, Plan
from lowvram.quant import (
    HeadChoice,
    KernelName,
    choose_head,
    head_loading_bytes,
    preferred_kernel,
)
from lowvram.settings import GenerationSettings
from lowvram.tensors import Part

MODULES: tuple[Part, ...] = ("visual", "audio", "text", "talker", "token2wav")

ACCELERATOR_WORKSPACE_BYTES = 64 * 2**20
"""Matrix libraries' own buffers and the allocator's rounding on cuda and npu; an upper bound."""

HEADS = ("head8", "head4")
OPTIONS = (*HEADS, "talker8", "kv8", "vocoder16")
"""Names that `allow` takes: options that change results, and are used only where named."""


@dataclass(frozen=True)
class Choice:
    """One way to run the phases: what stays on the device throughout, and the rows that follow."""

    resident: frozenset[str]
    rows: tuple[PhasePlan, ...]

    @property
    def peak(self) -> int:
        return max(row.predicted_peak_bytes for row in self.rows)

    @property
    def interleaved(self) -> bool:
        return any("+" in row.name for row in self.rows)


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

    Raises:
        UsageError: an unknown device, type, option or size; a prompt beyond the model's window.
        DeviceError: an absent device and no budget.
    """
    facts = probe_device(device)
    budget = decide_budget(max_memory, facts)
    chosen = resolve_dtype(dtype, model.stored_dtype, facts, packed=bool(model.packed))
    return make_plan(model, shape, settings, facts=facts, budget=budget, dtype=chosen, allow=allow)


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
    kernel: Literal["auto", "reference"] = "auto",
) -> Plan:
    """The plan for a request within `budget`; `fits` is False where none does.

    `kernel`: `reference` plans for packed linears that are computed by de-quantizing, everywhere.
    `on_device` are the modules that an earlier request left there; the plan keeps those that this
    one does not use, as far as they fit.
    """
    check_options(allow)
    settings = settings.completed(model.generation)
    text = model.config.thinker.text
    check_window(shape.next_position, settings.tokens, text.max_position_embeddings)
    packed = preferred_kernel(facts.type, dtype.name, kernel)
    head = choose_head(allow, packed.name, text.hidden_size, text.vocab_size)
    sizes = _sizes(model, dtype.name, packed.name, head)
    weights = {part: size.total for part, size in sizes.items()}
    loading = head_loading_bytes(text.hidden_size, text.vocab_size) if head and head.bits else 0

    def choose(changed: GenerationSettings) -> list[Choice]:
        phases = request_phases(
            model,
            shape,
            changed,
            dtype=dtype.name,
            text_sizes=sizes["text"],
            head_loading=loading,
            host_is_device=facts.type == "cpu",
        )
        return list(_choices(phases, weights, facts, on_device))

    choices = choose(settings)
    minimum = minimum_budget(min(choice.peak for choice in choices))
    used = {module for row in choices[0].rows for module in row.modules}
    room = budget.budget_bytes - budget.guard_bytes
    fitting = [choice for choice in choices if choice.peak <= room]
    best = (
        max(fitting, key=lambda c: _worth(c, used, weights))
        if fitting
        else min(choices, key=lambda c: c.peak)
    )
    reasons = [
        *_reasons(best, used, weights, facts, budget, minimum, allow),
        f"{dtype.name}: {dtype.reason}",
    ]
    if model.packed:
        reasons.append(f"packed linears, {packed.name}: {packed.reason}")
    if head is not None:
        reasons.append(head.reason)
    return Plan(
        fits=bool(fitting),
        model=model.name,
        device=facts.name,
        dtype=dtype.name,
        budget_bytes=budget.budget_bytes,
        context_bytes=facts.context_bytes,
        guard_bytes=budget.guard_bytes,
        predicted_peak_bytes=best.peak,
        minimum_budget_bytes=minimum,
        phases=best.rows,
        residency=_residency(best, used),
        bytes_to_move=sum(weights[m] for m in used - (on_device & best.resident)),
        reasons=tuple(reasons),
        knobs={} if fitting else _cheaper(settings, choose, minimum),
        chunks={"text": PREFILL_CHUNK, "talker": PREFILL_CHUNK},
        kv={"thinker": "device", "talker": "device"},
    )


def _sizes(
    model: ModelFacts, dtype: str, kernel: KernelName, head: HeadChoice | None
) -> dict[str, PartSizes]:
    """Bytes of every module."""
    bits = None if head is None else head.bits
    return {m: model.part_sizes(m, ITEMSIZE[dtype], kernel, bits) for m in MODULES}


def _cheaper(
    settings: GenerationSettings,
    choose: Callable[[GenerationSettings], list[Choice]],
    minimum: int,
) -> dict[str, int]:
    """The smallest budget with each change that would need less than `minimum`, by flag."""
    needed = {
        knob: minimum_budget(min(choice.peak for choice in choose(changed)))
        for knob, changed in _knobs(settings)
    }
    return {knob: size for knob, size in needed.items() if size < minimum}


def _knobs(settings: GenerationSettings) -> Iterator[tuple[str, GenerationSettings]]:
    """Changes that a user could make to a request that does not fit, by flag."""
    if settings.speech:
        yield "--no-speech", replace(settings, speech=False)
        yield "--max-speech 10", replace(settings, max_speech_seconds=10.0)
    if settings.tokens > 256:
        yield "--max-tokens 256", replace(settings, max_new_tokens=256)


def check_options(allow: Sequence[str]) -> None:
    """Raises UsageError for a name that is none of `OPTIONS`."""
    for name in allow:
        if name not in OPTIONS:
            raise UsageError(
                f"unknown option {name!r} in allow; wanted some of {', '.join(OPTIONS)}"
            )


def minimum_budget(peak: int) -> int:
    """The smallest budget whose guard still leaves `peak`."""
    budget = peak + guard_bytes(peak)
    while budget - guard_bytes(budget) < peak:
        budget += peak - (budget - guard_bytes(budget))
    return budget


def _choices(
    phases: list[PhaseLoad],
    weights: Mapping[str, int],
    facts: DeviceFacts,
    on_device: frozenset[str],
) -> Iterator[Choice]:
    """Every set of modules to keep, with the last two phases apart and (when both speak) joined."""
    orders = [phases]
    if phases[-1].name == "vocode":
        orders.append([*phases[:-2], phases[-2].joined(phases[-1])])
    candidates = sorted({m for phase in phases for m in phase.modules} | on_device)
    for order in orders:
        for count in range(len(candidates) + 1):
            for kept in combinations(candidates, count):
                resident = frozenset(kept)
                rows = tuple(_row(phase, resident, weights, facts) for phase in order)
                yield Choice(resident, rows)


def _row(
    phase: PhaseLoad, resident: frozenset[str], weights: Mapping[str, int], facts: DeviceFacts
) -> PhasePlan:
    there = tuple(m for m in MODULES if m in resident or m in phase.modules)
    library = ACCELERATOR_WORKSPACE_BYTES if facts.type in ("cuda", "npu") else 0
    parts = {
        "weights": sum(weights[m] for m in there),
        "slabs": 0,
        "kv": phase.kv,
        "carry": phase.carry,
        "activations": phase.activations,
        "workspace": library + phase.workspace,
    }
    stays = [m for m in phase.modules if m in resident]
    return PhasePlan(
        name=phase.name,
        predicted_peak_bytes=facts.context_bytes + sum(parts.values()),
        parts=parts,
        modules=phase.modules,
        on_device=there,
        reason=f"{', '.join(phase.modules)}: {'stays' if stays else 'loaded for this phase'}",
    )


def _worth(choice: Choice, used: set[str], weights: Mapping[str, int]) -> tuple[int, bool, int]:
    """Bytes that the next such request need not move; then early speech; then leftovers kept."""
    saved = sum(weights[m] for m in choice.resident & used)
    return saved, choice.interleaved, sum(weights[m] for m in choice.resident)


def _residency(choice: Choice, used: set[str]) -> dict[str, str]:
    where = {"embed": "host"}
    for module in MODULES:
        if module in choice.resident:
            where[module] = "resident"
        else:
            where[module] = "on demand" if module in used else "unused"
    return where


def _reasons(
    choice: Choice,
    used: set[str],
    weights: Mapping[str, int],
    facts: DeviceFacts,
    budget: Budget,
    minimum: int,
    allow: Sequence[str],
) -> tuple[str, ...]:
    peak = max(choice.rows, key=lambda row: row.predicted_peak_bytes)
    lines = [f"the peak is {peak.name}: {format_size(peak.predicted_peak_bytes)}"]
    if choice.peak > budget.budget_bytes - budget.guard_bytes:
        lines.append(f"the smallest budget that would do is {format_size(minimum)}")
    for module in MODULES:
        if module not in used:
            continue
        bytes_ = format_size(weights[module])
        if module in choice.resident:
            lines.append(f"{module} ({bytes_}) stays: every phase fits beside it")
        else:
            lines.append(f"{module} ({bytes_}) is loaded for its phase and dropped after it")
    if "token2wav" in used:
        lines.append(
            "speech is vocoded while codes are drawn: Talker and vocoder fit together"
            if choice.interleaved
            else "speech is vocoded after all codes are drawn: Talker and vocoder do not both fit"
        )
    if facts.assumed:
        lines.append(f"context {format_size(facts.context_bytes)} is assumed, not measured")
    lines += [
        f"{name} is allowed; no plan of this version uses it" for name in allow if name not in HEADS
    ]
    return tuple(lines)
