"""When speech is made: while the Thinker writes, while codes are drawn, or after the last code."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowvram import AudioChunk, Finished, LowVRAMOmni, Result, TextDelta, UsageError
from lowvram.models.dit import Block
from lowvram.planner.choices import Choices
from lowvram.pocket import make_checkpoint

WORDS = [{"role": "user", "content": "Say something."}]
LONG: dict[str, Any] = {"max_new_tokens": 48, "max_speech_seconds": 3.0}
ROWS = {
    "together": ["prefill", "decode+talk+vocode"],
    "interleaved": ["prefill", "decode", "talk+vocode"],
    "staged": ["prefill", "decode", "talk", "vocode"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pocket"
    make_checkpoint(path, seed=5)
    return path


def answer(folder: Path, max_memory: int | None) -> Result:
    with LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory=max_memory) as omni:
        return omni.generate(WORDS, **LONG)


def tighter(folder: Path) -> int:
    """A budget that holds Talker and vocoder together, but not the Thinker beside them."""
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as omni:
        roomy = omni.plan(WORDS, **LONG)
    for sixteenths in range(16, 32):
        budget = roomy.minimum_budget_bytes * sixteenths // 16
        with LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory=budget) as omni:
            plan = omni.plan(WORDS, **LONG)
        # Smaller chunks would round differently.
        if [row.name for row in plan.phases] == ROWS["interleaved"] and plan.chunks == roomy.chunks:
            return budget
    raise AssertionError("no budget leads to that order")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Result]:
    found = {"together": answer(folder, None), "interleaved": answer(folder, tighter(folder))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Choices, "_can_interleave", False)
        found["staged"] = answer(folder, None)
    return found


@pytest.fixture
def omni(folder: Path) -> Iterator[LowVRAMOmni]:
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as loaded:
        yield loaded


def test_every_order_gives_the_same_tokens_codes_and_samples(results: dict[str, Result]) -> None:
    first, *others = results.values()
    assert len(first.tokens) == 48 and len(first.codes) == 150
    for other in others:
        assert other.tokens == first.tokens and other.codes == first.codes
        assert first.audio is not None and other.audio is not None
        np.testing.assert_array_equal(other.audio, first.audio)


def test_every_row_keeps_what_was_predicted(results: dict[str, Result]) -> None:
    for order, result in results.items():
        assert [row.name for row in result.report.phases] == ROWS[order]
        for row in result.report.phases:
            assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes


def test_speech_begins_while_the_thinker_writes(omni: LowVRAMOmni) -> None:
    events = list(omni.stream(WORDS, **LONG))
    kinds = [type(event) for event in events]
    first = kinds.index(AudioChunk)
    assert TextDelta in kinds[first:], "text must still come after the first sound"
    # A code for every state, and a state for every token but the first: 36 codes after 37 tokens.
    assert kinds[:first].count(TextDelta) <= 37
    chunk = events[first]
    assert isinstance(chunk, AudioChunk) and len(chunk.samples) >= 0.25 * chunk.sample_rate


def test_the_first_sound_needs_36_codes(omni: LowVRAMOmni, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram.engine.run import Run

    runs: list[Run] = []
    events = Run.events

    def watched(self: Run) -> Any:
        runs.append(self)
        return events(self)

    monkeypatch.setattr(Run, "events", watched)
    stream = omni.stream(WORDS, **LONG)
    next(event for event in stream if isinstance(event, AudioChunk))
    assert len(runs[0].codes) == 36
    stream.close()


def test_an_early_end_leaves_nothing(omni: LowVRAMOmni, folder: Path) -> None:
    whole = omni.generate(WORDS, **LONG)
    held = omni.resident
    for count in (1, 20, 37, 38, 45):
        stream = omni.stream(WORDS, **LONG)
        for _ in range(count):
            next(stream)
        stream.close()
        assert omni.resident == held
        # What the vocoder of any request needs stays, on the CPU within the budget.
        owners = {owner for owner, key in omni._meter._held if key != "constants"}
        assert owners <= {"weights"}, f"left behind after {count} events: {owners}"
    again = omni.generate(WORDS, **LONG)
    assert again.codes == whole.codes and np.array_equal(again.audio, whole.audio)
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as cold:
        stream = cold.stream(WORDS, **LONG)
        assert any(isinstance(event, AudioChunk) for event in stream)
        stream.close()
        assert cold.resident == ()


def test_a_talker_that_ends_before_the_thinker_is_heard_to_its_end_at_once(
    folder: Path, omni: LowVRAMOmni
) -> None:
    options = {**LONG, "max_speech_seconds": 0.8}
    with LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory=tighter(folder)) as other:
        later = other.generate(WORDS, **options)
    *events, last = omni.stream(WORDS, **options)
    assert isinstance(last, Finished) and len(last.result.tokens) == 48
    assert last.result.codes == later.codes and len(later.codes) == 40
    assert np.array_equal(last.result.audio, later.audio)  # type: ignore[arg-type]
    sounds = [i for i, event in enumerate(events) if isinstance(event, AudioChunk)]
    written = sum(isinstance(event, TextDelta) for event in events[: sounds[-1]])
    # The last of 40 codes hears the 40th state, which follows the 40th token.
    assert written == 40 < len(last.result.tokens)


def test_what_waits_while_others_compute_is_counted(omni: LowVRAMOmni) -> None:
    """In a row that Thinker, Talker and vocoder share: logits, what the Talker draws with, what the
    vocoder keeps of the speech so far."""
    omni.generate(WORDS, max_new_tokens=2, max_speech_seconds=0.1)
    before = _alive() - sum(omni._meter.held().values())
    stream = omni.stream(WORDS, **LONG)
    next(event for event in stream if isinstance(event, AudioChunk))
    # Noise of 36 codes, and vectors, are not.
    assert _alive() - sum(omni._meter.held().values()) - before < 2**15
    stream.close()


def test_whoever_keeps_an_interruption_keeps_nothing_else(
    omni: LowVRAMOmni, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while a later piece goes through the DiT."""
    omni.generate(WORDS, max_new_tokens=2, max_speech_seconds=0.1)
    before = _alive()
    forward, calls = Block.forward, []

    def interrupted(*of: Any) -> Any:
        calls.append(None)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return forward(*of)

    monkeypatch.setattr(Block, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        omni.generate(WORDS, **LONG)
    assert _alive() - before < 2**12 and kept.value is not None


def _alive() -> int:
    """Bytes of all tensors there are."""
    gc.collect()
    found = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in found if not t.is_meta}
    return sum(storage.nbytes() for storage in storages.values())


def test_pieces_are_those_that_were_asked_for(omni: LowVRAMOmni) -> None:
    usual = omni.generate(WORDS, **LONG)
    options = {**LONG, "pieces": (1, 3), "look_ahead": 2}
    chunks = [event for event in omni.stream(WORDS, **options) if isinstance(event, AudioChunk)]
    # Less 20 frames, which the vocoder still waits for: 36 codes for the first, then 36 each.
    assert [len(chunk.codes) for chunk in chunks[:3]] == [2, 36, 36]
    assert sum((chunk.codes for chunk in chunks), ()) == usual.codes
    whole = omni.generate(WORDS, **LONG, whole_speech=True)
    assert whole.codes == usual.codes and whole.audio is not None and usual.audio is not None
    assert np.abs(whole.audio - usual.audio).max() < 1e-2
    with pytest.raises(UsageError, match="wanted one or more blocks"):
        omni.plan(WORDS, pieces=())
