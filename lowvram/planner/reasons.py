"""Why a plan is as it is: a line for each choice, with its bytes. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowvram.offload import Budget, format_size
from lowvram.planner.allowed import CONCERNS, HEADS
from lowvram.planner.choices import MODULES, Choice, Choices
from lowvram.planner.gains import gains, minimum_budget, untried
from lowvram.planner.laws import kv_bytes
from lowvram.planner.options import Limits, Option
from lowvram.planner.plan import PhasePlan
from lowvram.planner.question import Question
from lowvram.planner.seconds import Rates
from lowvram.planner.work import expected_codes, expected_tokens
from lowvram.quant import native_layers
from lowvram.tensors import Part


def reasons(
    question: Question,
    choices: Choices,
    choice: Choice,
    rows: Sequence[PhasePlan],
    budget: Budget,
    minimum: int,
    why_source: str,
) -> tuple[str, ...]:
    """The lines, the most important first."""
    peak = max(rows, key=lambda row: row.predicted_peak_bytes)
    fits = peak.predicted_peak_bytes <= budget.budget_bytes - budget.guard_bytes
    lines = [f"the peak is {peak.name}: {format_size(peak.predicted_peak_bytes)}"]
    if not fits:
        lines.append(f"the smallest budget that would do is {format_size(minimum, round_up=True)}")
    lines += _modules(choices, choice)
    if any(option.cut.streamed for option in choice.options.values()):
        lines.append(f"streamed units come from {why_source}")
    lines += _speech(choices, choice)
    lines += _times(choices, choice, rows)
    lines += _options(question, choices, choice, budget, minimum, fits)
    facts = question.facts
    if facts.assumed:
        lines.append(f"context {format_size(facts.context_bytes)} is assumed, not measured")
    lines.append(f"{question.dtype.name}: {question.dtype.reason}")
    if question.model.packed:
        packed = question.packed_kernel
        lines.append(f"packed linears, {packed.name}: {packed.reason}")
    lines += _layers(question, choices, choice)
    return tuple(lines)


def _layers(question: Question, choices: Choices, choice: Choice) -> Iterator[str]:
    """How a token goes through the decoders' layers, where there are two ways."""
    if "kv8" in question.used:
        return
    for part in choice.options:
        if part == "text" and question.model.packed and question.packed_kernel.name != "native":
            continue  # its products are told of, and why they are no other
        decoder = choices.request.decoder(part)
        shape = decoder.hidden_size, decoder.intermediate_size
        found = native_layers(question.facts.type, question.dtype.name, *shape)
        if found is not None:
            yield f"{part}: {found.reason}"


def _modules(choices: Choices, choice: Choice) -> Iterator[str]:
    for module in MODULES:
        if module not in choices.used:
            continue
        size = format_size(choices.weights[module])
        option = choice.options.get(module)
        if module in choice.resident:
            yield f"{module} ({size}) stays: every phase fits beside it"
        elif option is None or not option.cut.streamed:
            yield f"{module} ({size}) is loaded for its phase and dropped after it"
        if option is not None:
            yield from _option(choices, module, option)


def _option(choices: Choices, module: Part, option: Option) -> Iterator[str]:
    request = choices.request
    sizes = request.sizes[module]
    cut = option.cut
    if cut.streamed:
        pieces = len(sizes.units) - sizes.layers
        head = f" and {cut.pieces} of {pieces} pieces of the head" if cut.pieces else ""
        saved = choices.weights[module] - cut.on_device
        yield (
            f"{module}: {cut.layers} of {sizes.layers} layers{head} stream through "
            f"{format_size(cut.slabs)} of slabs: {format_size(saved)} less on the device, "
            f"{format_size(cut.moved)} to move in every pass"
        )
    whole = request.kv_layer_bytes(module) * request.kv_layers(module)
    two = 2 * request.kv_layer_bytes(module)
    if option.kv == "host":
        yield (
            f"{module}: keys and values ({format_size(whole)}) wait on the host, two layers' "
            f"({format_size(two)}) are on the device"
        )
    elif not request.host_is_device:
        yield f"{module}: keys and values ({format_size(whole)}) stay on the device"
    yield f"{module}: {option.chunk} tokens of the prompt at a time"


def _speech(choices: Choices, choice: Choice) -> Iterator[str]:
    if choice.talk is None:
        return
    both = format_size(choices.weights["talker"] + choices.weights["token2wav"])
    if choice.order == "together":
        every = format_size(sum(choices.weights[m] for m in SPEAKING))
        yield (
            "speech begins while the Thinker writes: Thinker, Talker and vocoder "
            f"({every}) fit together"
        )
    elif choice.order == "interleaved":
        yield f"speech is vocoded while codes are drawn: Talker and vocoder ({both}) fit together"
    else:
        yield (
            "speech is vocoded after all codes are drawn: Talker and vocoder "
            f"({both}) together would not fit, or would gain nothing"
        )


def _times(choices: Choices, choice: Choice, rows: Sequence[PhasePlan]) -> Iterator[str]:
    rates: Rates = choices.rates
    yield (
        f"speeds are assumed: memory {rates.memory / 1e9:g}, bus {rates.bus / 1e9:g}, disk "
        f"{rates.disk / 1e9:g} GB/s, {rates.compute / 1e12:g} Tflop/s"
    )
    for row in rows:
        if row.name == "decode":
            tokens = expected_tokens(choices.request)
            yield (
                f"decode: about {_about(tokens / row.seconds)} tokens a second over {tokens} "
                f"tokens, bound by {row.bound}"
            )
    if choice.talk is not None:
        codes = expected_codes(choices.request)
        yield (
            f"the first sound after about {_about(choice.first_sound)} s, the last after "
            f"{_about(choice.seconds)} s, for {codes / 50:g} s of speech"
        )


def _about(number: float) -> str:
    if number >= 1:
        return f"{number:.0f}" if number >= 10 else f"{number:.1f}"
    return f"{number:.2g}"


def _options(
    question: Question,
    choices: Choices,
    choice: Choice,
    budget: Budget,
    minimum: int,
    fits: bool,
) -> Iterator[str]:
    """What the allowed options do, and what others would gain where that would change anything."""
    for name in dict.fromkeys(question.allow):
        yield _effect(question, choices, name)
    if not fits:
        for names, size in gains(question, minimum).items():
            yield (
                f"{names} would lower the smallest budget by {format_size(minimum - size)} to "
                f"{format_size(size, round_up=True)}, where allowed"
            )
    elif choice.talk is not None and choice.order != "together":
        yield from _early_speech(question, choices, budget)


def _effect(question: Question, choices: Choices, name: str) -> str:
    refused = question.refused(name)
    if refused is not None:
        return refused
    if name in HEADS and question.head is not None:
        return question.head.reason
    if name not in question.used:
        return (
            f"{name} is not used: the Talker would have to stay whole while it talks, and does "
            "not fit"
        )
    if name == "kv8":
        return "kv8: " + " and ".join(_rounded_kv(choices))
    part = CONCERNS[name]
    if part not in choices.used:
        return f"{name}: the {part} is not used"
    stored = question.stored_sizes(part).total
    return (
        f"{name}: {format_size(stored)} of the {part} become {format_size(choices.weights[part])}"
    )


def _rounded_kv(choices: Choices) -> Iterator[str]:
    request = choices.request
    parts: tuple[Part, ...] = ("text", "talker") if choices.vocode else ("text",)
    for part in parts:
        layers, tokens = request.kv_layers(part), request.kv_tokens(part)
        stored = kv_bytes(request.decoder(part), tokens, request.itemsize)
        kept = layers * request.kv_layer_bytes(part) + request.kv_wide_bytes(part)
        yield f"{format_size(stored)} of the {part}'s keys and values become {format_size(kept)}"


def _early_speech(question: Question, choices: Choices, budget: Budget) -> Iterator[str]:
    """Thinker, Talker and vocoder at once: what speaking while the Thinker writes would need."""
    needed = minimum_budget(_together(choices))
    yield (
        "speech begins when the text is complete; to speak while the Thinker writes, all three on "
        f"the device, would take {format_size(needed)}"
    )
    if needed <= budget.budget_bytes:
        return
    for name in untried(question):
        (other, *_) = question.allowing(name).ways()
        less = minimum_budget(_together(Choices(other.request(), other.facts, choices.source)))
        if less < needed:
            yield f"{name} would take {format_size(needed - less)} off that, where allowed"


def _together(choices: Choices) -> int:
    least = choices.together.smallest(Limits(streams=False, kv="device"))
    assert least is not None
    return choices.base + least + choices.weights["talker"] + choices.weights["token2wav"]


SPEAKING: tuple[Part, ...] = ("text", "talker", "token2wav")
"""What is on the device where speech begins while the Thinker writes."""
