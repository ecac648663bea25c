"""From a choice to the rows of a plan: what is on the device in each phase. No torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from lowvram.planner.choices import MODULES, Choice, Choices
from lowvram.planner.options import Option
from lowvram.planner.phases import PhaseLoad
from lowvram.planner.plan import Bound, PhasePlan
from lowvram.planner.seconds import Work, loading
from lowvram.planner.work import expected_codes, expected_tokens
from lowvram.tensors import Part


class _Phase(NamedTuple):
    """A phase of a choice: what it holds and does; `opens` are the modules it may have to load."""

    load: PhaseLoad
    work: Work
    opens: tuple[Part, ...]


def phase_rows(
    choices: Choices, choice: Choice, on_device: Collection[str]
) -> tuple[PhasePlan, ...]:
    """The phases in order. `on_device` is what this request finds loaded: what stays counts from
    the phase on that loads it."""
    rows = []
    there = {module for module in choice.resident if module in on_device}
    for phase in _phases(choices, choice):
        brought = [module for module in phase.opens if module not in there]
        there |= choice.resident.intersection(phase.load.modules)
        rows.append(_row(choices, choice, phase, there, brought))
    return tuple(rows)


def moved_bytes(choices: Choices, choice: Choice, on_device: Collection[str]) -> int:
    """Bytes of weights that come to the device: what is loaded, and what streams while a reply of
    the expected length is made."""
    request = choices.request
    loaded = sum(
        _held(choices, choice, module)
        for module in choices.used
        if not (module in on_device and module in choice.resident)
    )
    loaded += sum(request.sizes[module].passing for module in choices.used)
    passes = {"text": 1 + expected_tokens(request), "talker": 1 + expected_codes(request)}
    streamed = (passes[part] * option.cut.moved for part, option in choice.options.items())
    return loaded + sum(streamed)


def _phases(choices: Choices, choice: Choice) -> list[_Phase]:
    phases = [_Phase(phase, choices.works[phase.name], phase.modules) for phase in choices.towers]
    options = choices.together if choice.order == "together" else choices.think
    thinking = zip(options.phases(choice.think), options.works(choice.think), strict=True)
    for index, (load, work) in enumerate(thinking):
        phases.append(_Phase(load, work, () if index else load.modules))
    if choice.talk is None or choices.vocode is None:
        return phases
    options = choices.joined if choice.order == "interleaved" else choices.staged
    (load,), (work,) = options.phases(choice.talk), options.works(choice.talk)
    vocoding = choices.works["vocode"]
    if choice.order == "together":
        decode = phases.pop()
        spoken = decode.load.modules[1:]
        return [*phases, _Phase(decode.load, decode.work + work + vocoding, spoken)]
    if choice.order == "interleaved":
        return [*phases, _Phase(load, work + vocoding, load.modules)]
    return [
        *phases,
        _Phase(load, work, load.modules),
        _Phase(choices.vocode, vocoding, choices.vocode.modules),
    ]


def _held(choices: Choices, choice: Choice, module: Part) -> int:
    """Bytes of a module's weights that stay while it is used."""
    option = choice.options.get(module)
    return choices.weights[module] if option is None else option.cut.held


def _row(
    choices: Choices,
    choice: Choice,
    phase: _Phase,
    resident: Collection[Part],
    brought: Sequence[Part],
) -> PhasePlan:
    load = phase.load
    there = tuple(m for m in MODULES if m in resident or m in load.modules)
    option = next((choice.options[m] for m in load.modules if m in choice.options), None)
    slabs = option.cut.slabs if option else 0
    library = choices.facts.library_bytes
    carry = load.carry + choices.request.kept_bytes
    parts = {"weights": sum(_held(choices, choice, m) for m in there), "carry": carry}
    computing = slabs + load.kv + load.activations + load.workspace
    if load.loading > computing:
        parts |= {"slabs": 0, "kv": 0, "activations": 0, "workspace": library + load.loading}
    else:
        parts |= {"slabs": slabs, "kv": load.kv, "activations": load.activations}
        parts["workspace"] = library + load.workspace
    passing = sum(choices.request.sizes[m].passing for m in phase.opens)
    loaded = passing + sum(_held(choices, choice, m) for m in brought)
    read = passing + sum(choices.weights[m] for m in brought)  # what streams as well, once
    loading_s, computing_s = loading(read, choices.rates), phase.work.seconds(choices.rates)
    return PhasePlan(
        name=load.name,
        predicted_peak_bytes=choices.facts.context_bytes + sum(parts.values()),
        parts=parts,
        modules=load.modules,
        on_device=there,
        reason=_reason(choice, load),
        seconds=loading_s + computing_s,
        bound="disk" if loading_s > computing_s else _bound(choices, phase.work),
        bytes_moved=int(loaded + max(phase.work.bus, phase.work.disk)),
    )


def _bound(choices: Choices, work: Work) -> Bound:
    times = work.times(choices.rates)
    return max(times, key=lambda name: times[name])


def _reason(choice: Choice, load: PhaseLoad) -> str:
    said = []
    for module in load.modules:
        option: Option | None = choice.options.get(module)
        if module in choice.resident:
            said.append(f"{module} stays")
        elif option is not None and option.cut.streamed:
            said.append(f"{module} streams {len(option.cut.streamed)} of its units")
        else:
            said.append(f"{module} is loaded for this phase")
    return "; ".join(said)
