"""What would need less: other requests, and options that change results. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lowvram.conversation import PromptShape
from lowvram.offload import guard_bytes
from lowvram.planner.allowed import HEADS, OPTIONS
from lowvram.planner.choices import Choices
from lowvram.planner.question import Question


def minimum_budget(peak: int) -> int:
    """The smallest budget whose guard still leaves `peak`."""
    budget = peak + guard_bytes(peak)
    while budget - guard_bytes(budget) < peak:
        budget += peak - (budget - guard_bytes(budget))
    return budget


def smallest_budget(question: Question) -> int:
    """The smallest budget for the question."""
    ways = (Choices(way.request(), way.facts, "pinned") for way in question.ways())
    return min(minimum_budget(choices.smallest()) for choices in ways)


def cheaper(question: Question, minimum: int) -> dict[str, int]:
    """The smallest budget with each change that would need less than `minimum`, by flag."""
    needed = {knob: smallest_budget(changed) for knob, changed in _knobs(question)}
    found = {knob: size for knob, size in needed.items() if size < minimum}
    return found | {f"--allow {names}": size for names, size in gains(question, minimum).items()}


def gains(question: Question, minimum: int) -> dict[str, int]:
    """The smallest budget with each option that is not allowed and would lower it; with all of
    them, where that would lower it further."""
    names = untried(question)
    needed = {name: smallest_budget(question.allowing(name)) for name in names}
    found = {name: size for name, size in needed.items() if size < minimum}
    if len(names) > 1:
        together = smallest_budget(question.allowing(*names))
        if together < min(found.values(), default=minimum):
            found[",".join(names)] = together
    return found


def untried(question: Question) -> list[str]:
    """Options that are not allowed and would have an effect here."""
    names = [
        name
        for name in OPTIONS
        if name not in question.allow and question.allowing(name).refused(name) is None
    ]
    if question.head is not None and question.head.bits is not None:
        return [name for name in names if name not in HEADS]
    return [name for name in names if name != "head8" or "head4" not in names]


def _knobs(question: Question) -> Iterator[tuple[str, Question]]:
    """Changes that a user could make to a request that does not fit, by flag."""
    settings, shape = question.settings, question.shape
    if settings.speech:
        yield "--no-speech", replace(question, settings=replace(settings, speech=False))
        shorter = replace(settings, max_speech_seconds=10.0)
        yield "--max-speech 10", replace(question, settings=shorter)
    if settings.tokens > 256:
        yield "--max-tokens 256", replace(question, settings=replace(settings, max_new_tokens=256))
    if shape.audio_frames or any(time > 1 for time, _, _ in shape.grids):  # no picture is shorter
        yield "half as long a clip", replace(question, shape=_half_as_long(shape))
    if shape.grids:
        yield "--max-pixels halved", replace(question, shape=_half_the_pixels(question))


def _half_as_long(shape: PromptShape) -> PromptShape:
    return replace(
        shape,
        tokens=(shape.tokens + 1) // 2,
        grids=tuple((-(-time // 2), height, width) for time, height, width in shape.grids),
        audio_frames=tuple(-(-frames // 2) for frames in shape.audio_frames),
    )


def _half_the_pixels(question: Question) -> PromptShape:
    shape = question.shape
    merge = question.model.config.thinker.vision.spatial_merge_size
    grids = tuple((t, max(merge, h // 2 // merge * merge), w) for t, h, w in shape.grids)
    fewer = sum(
        t * (h - lower) * w // merge**2
        for (t, h, w), (_, lower, _) in zip(shape.grids, grids, strict=True)
    )
    return replace(shape, tokens=max(1, shape.tokens - fewer), grids=grids)
