"""What would need less: other requests, and options that change results. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lowvram.conversation import PromptShape
from lowvram.offload import guard_bytes
from lowvram.planner.choices import Choices
from lowvram.planner.question import Question

LATER = ("head8", "head4", "talker8", "kv8", "vocoder16")
"""Options that change results and that this version does not use, or not on every device."""


def minimum_budget(peak: int) -> int:
    """The smallest budget whose guard still leaves `peak`."""
    budget = peak + guard_bytes(peak)
    while budget - guard_bytes(budget) < peak:
        budget += peak - (budget - guard_bytes(budget))
    return budget


def smallest_budget(question: Question) -> int:
    """The smallest budget for the question."""
    return minimum_budget(Choices(question.request(), question.facts, "pinned").smallest())


def cheaper(question: Question, minimum: int) -> dict[str, int]:
    """The smallest budget with each change that would need less than `minimum`, by flag."""
    needed = {knob: smallest_budget(changed) for knob, changed in _knobs(question)}
    return {knob: size for knob, size in needed.items() if size < minimum}


def later_gains(question: Question, minimum: int) -> dict[str, int]:
    """The smallest budget with each option that is not used and would lower it."""
    rounded = question.head is not None and question.head.bits is not None
    names = [name for name in LATER if not (rounded and name.startswith("head"))]
    needed = {name: smallest_budget(question.with_later(name)) for name in names}
    found = {name: size for name, size in needed.items() if size < minimum}
    together = smallest_budget(question.with_later(*names))
    if together < min(found.values(), default=minimum):
        found[" and ".join(names)] = together
    return found


def _knobs(question: Question) -> Iterator[tuple[str, Question]]:
    """Changes that a user could make to a request that does not fit, by flag."""
    settings, shape = question.settings, question.shape
    if settings.speech:
        yield "--no-speech", replace(question, settings=replace(settings, speech=False))
        shorter = replace(settings, max_speech_seconds=10.0)
        yield "--max-speech 10", replace(question, settings=shorter)
    if settings.tokens > 256:
        yield "--max-tokens 256", replace(question, settings=replace(settings, max_new_tokens=256))
    if shape.grids or shape.audio_frames:
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
