"""Whole requests on the built-in model: budgets, residency, seeds, what is read, what is left."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowvram import (
    AudioChunk,
    DoesNotFitError,
    Finished,
    LowVRAMOmni,
    MediaError,
    Result,
    TextDelta,
    UsageError,
)
from lowvram.engine import speaking
from lowvram.engine.vocode import SpeechStream
from lowvram.models.text import ThinkerText
from lowvram.offload import Loader, Store, TensorInfo
from lowvram.parts import Kernel
from lowvram.pocket import make_checkpoint

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 255, (84, 112, 3), dtype=np.uint8)
SOUND = (0.3 * np.sin(np.arange(40_000) / 9)).astype(np.float32)
CLIP = RNG.integers(0, 255, (6, 56, 84, 3), dtype=np.uint8)

WORDS = [{"role": "user", "content": "Say something."}]
EVERYTHING = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": PICTURE},
            {"type": "audio", "audio": SOUND},
            {"type": "video", "video": CLIP},
            {"type": "text", "text": "What is all this?"},
        ],
    }
]
SHORT: dict[str, Any] = {"max_new_tokens": 8, "max_speech_seconds": 1.6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pocket"
    make_checkpoint(path, seed=5)
    return path


@pytest.fixture
def omni(folder: Path) -> Iterator[LowVRAMOmni]:
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as loaded:
        yield loaded


def generate(folder: Path, conversation: Any, max_memory: int | None, **options: Any) -> Result:
    with LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory=max_memory) as omni:
        return omni.generate(conversation, **SHORT | options)


def same(one: Result, other: Result) -> bool:
    return (
        one.tokens == other.tokens
        and one.codes == other.codes
        and np.array_equal(one.audio, other.audio)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("awq", [False, True], ids=["16-bit", "awq"])
def test_every_budget_gives_the_same_reply_and_is_kept(awq: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_checkpoint(folder, seed=5, awq=awq)
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as omni:
        plan = omni.plan(EVERYTHING, **SHORT)
        roomy = omni.generate(EVERYTHING, **SHORT)
    assert {"resident"} == {v for k, v in plan.residency.items() if k != "embed"}
    seen = set()
    smallest = plan.minimum_budget_bytes
    for budget in (smallest, smallest + 2**21, smallest + 2**23, 2 * smallest):
        with LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory=budget) as omni:
            tight = omni.plan(EVERYTHING, **SHORT)
            result = omni.generate(EVERYTHING, **SHORT)
        seen.add(tuple(tight.residency.values()))
        # Smaller chunks are the last resort, for they round differently.
        assert tight.chunks != plan.chunks or same(result, roomy)
        for row in result.report.phases:
            assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes
        assert result.report.measured_peak_bytes <= budget
    assert len(seen) > 2, "the budgets must lead to different plans"


def test_below_the_smallest_budget_it_is_refused_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as omni:
        minimum = omni.plan(EVERYTHING, **SHORT).minimum_budget_bytes
    read: list[str] = []
    monkeypatch.setattr(Store, "read_into", lambda self, name, out: read.append(name))
    with pytest.raises(DoesNotFitError, match="smallest budget that would do") as refused:
        generate(folder, EVERYTHING, minimum - 1)
    assert not read
    assert refused.value.plan.minimum_budget_bytes == minimum  # type: ignore[attr-defined]


def test_the_same_request_twice_is_the_same_and_moves_nothing_again(omni: LowVRAMOmni) -> None:
    options: dict[str, Any] = {**SHORT, "temperature": 1.0}
    first = omni.generate(EVERYTHING, **options)
    again = omni.generate(EVERYTHING, **options)
    assert same(first, again)
    assert first.report.bytes_host_to_device > 0
    assert again.report.bytes_host_to_device == 0
    other = omni.generate(EVERYTHING, **options, seed=1)
    assert not same(first, other)
    assert same(first, omni.generate(EVERYTHING, **options))


def test_on_demand_modules_are_gone_after_the_request(folder: Path) -> None:
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as omni:
        minimum = omni.plan(EVERYTHING, **SHORT).minimum_budget_bytes
    with LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory=minimum) as omni:
        plan = omni.plan(EVERYTHING, **SHORT)
        omni.generate(EVERYTHING, **SHORT)
        assert set(omni.resident) == {
            m for m, where in plan.residency.items() if where == "resident"
        }
        assert "on demand" in plan.residency.values()


def test_the_talkers_states_are_gone_before_staged_speech_is_vocoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as omni:
        minimum = omni.plan(EVERYTHING, **SHORT).minimum_budget_bytes
    states: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    loop, push = speaking.TalkLoop, SpeechStream.push

    def watched(*args: Any, **kwargs: Any) -> speaking.TalkLoop:
        states.append(weakref.ref(kwargs["prompt_states"]))
        return loop(*args, **kwargs)

    def pushed(self: SpeechStream, codes: Any) -> Any:
        alive.append(states[0]() is not None)
        return push(self, codes)

    monkeypatch.setattr(speaking, "TalkLoop", watched)
    monkeypatch.setattr(SpeechStream, "push", pushed)
    with LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory=minimum) as omni:
        assert omni.plan(EVERYTHING, **SHORT).phases[-1].name == "vocode"
        omni.generate(EVERYTHING, **SHORT)
    assert alive and not any(alive)


def test_streamed_events_are_the_result(omni: LowVRAMOmni) -> None:
    events = list(omni.stream(WORDS, **SHORT))
    finished = events[-1]
    assert isinstance(finished, Finished)
    text = "".join(e.text for e in events if isinstance(e, TextDelta))
    chunks = [e for e in events if isinstance(e, AudioChunk)]
    assert text == finished.result.text
    np.testing.assert_array_equal(
        np.concatenate([c.samples for c in chunks]), finished.result.audio
    )
    assert sum((c.codes for c in chunks), ()) == finished.result.codes
    assert all(c.sample_rate == 24_000 and c.samples.dtype == np.float32 for c in chunks)
    ends = np.cumsum([len(c.samples) for c in chunks]) / 24_000
    assert [c.start_s for c in chunks] == pytest.approx([0.0, *ends[:-1]])
    assert len(finished.result.audio) == 480 * len(finished.result.codes)  # type: ignore[arg-type]
    assert same(finished.result, omni.generate(WORDS, **SHORT))


def test_speech_ends_at_the_checkpoints_own_bound(omni: LowVRAMOmni) -> None:
    result = omni.generate(WORDS, max_new_tokens=4)
    assert 0 < len(result.codes) <= 200


@pytest.mark.parametrize("loaded_with_speech", [True, False])
def test_text_alone_never_reads_talker_or_vocoder(
    folder: Path, loaded_with_speech: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = Store.read_run

    def spy(self: Store, info: TensorInfo, start: int, out: Any) -> None:
        read.append(info.name)
        original(self, info, start, out)

    monkeypatch.setattr(Store, "read_run", spy)
    with LowVRAMOmni.from_pretrained(folder, device="cpu", speech=loaded_with_speech) as omni:
        result = omni.generate(WORDS, return_audio=False, **SHORT)
    assert result.audio is None and result.codes == ()
    assert read
    assert not [name for name in read if name.startswith(("talker.", "token2wav."))]


def test_closing_the_stream_stops_the_work_and_frees_the_device(omni: LowVRAMOmni) -> None:
    whole = omni.generate(EVERYTHING, **SHORT)
    with LowVRAMOmni.from_pretrained(omni.checkpoint.folder, device="cpu") as fresh:
        stream = fresh.stream(EVERYTHING, **SHORT)
        for event in stream:
            if isinstance(event, AudioChunk):
                break
        stream.close()  # type: ignore[attr-defined]
        assert fresh.resident == ()
        assert same(fresh.generate(EVERYTHING, **SHORT), whole)


def test_an_error_in_the_middle_reaches_the_reader_and_leaves_nothing(
    omni: LowVRAMOmni, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("device fell over")

    with monkeypatch.context() as patched:
        patched.setattr(ThinkerText, "logits", fail)
        with pytest.raises(RuntimeError, match="fell over"):
            omni.generate(EVERYTHING, **SHORT)
    assert omni.resident == ()
    assert omni.generate(EVERYTHING, **SHORT).text


def test_one_request_at_a_time(omni: LowVRAMOmni) -> None:
    stream = omni.stream(WORDS, **SHORT)
    next(stream)
    with pytest.raises(UsageError, match="request is running"):
        omni.generate(WORDS, **SHORT)
    stream.close()  # type: ignore[attr-defined]
    assert omni.generate(WORDS, **SHORT).text


def test_a_closed_model_says_so(omni: LowVRAMOmni) -> None:
    with LowVRAMOmni.from_pretrained(omni.checkpoint.folder, device="cpu") as fresh:
        pass
    with pytest.raises(UsageError, match="closed; open it again"):
        fresh.generate(WORDS, **SHORT)


def test_the_packed_checkpoint_answers_like_its_unpacked_twin(tmp_path: Path) -> None:
    results = []
    for awq in (True, "dequantized"):
        make_checkpoint(tmp_path / str(awq), seed=2, awq=awq)  # type: ignore[arg-type]
        with LowVRAMOmni.from_pretrained(
            tmp_path / str(awq), device="cpu", dtype="float32", kernel="reference"
        ) as omni:
            results.append(omni.generate(EVERYTHING, **SHORT))
    assert results[0].tokens == results[1].tokens
    assert results[0].codes == results[1].codes


def test_the_fast_kernel_moves_no_logit_by_more_than_its_type_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path / "packed", seed=0, awq=True)
    seen: list[torch.Tensor] = []
    original = ThinkerText.logits

    def spy(self: ThinkerText, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(original(self, hidden))
        return seen[-1]

    monkeypatch.setattr(ThinkerText, "logits", spy)
    kernels: tuple[Kernel, ...] = ("auto", "reference")
    for kernel in kernels:
        with LowVRAMOmni.from_pretrained(tmp_path / "packed", device="cpu", kernel=kernel) as omni:
            omni.generate(WORDS, max_new_tokens=1, return_audio=False)
    fast, exact = seen
    assert not torch.equal(fast, exact)
    assert (fast - exact).norm() <= 1e-2 * exact.norm()


def test_unknown_names_are_refused_with_the_known_ones(omni: LowVRAMOmni) -> None:
    with pytest.raises(UsageError, match=r"Nobody.*Chelsie.*Ethan"):
        omni.generate(WORDS, speaker="Nobody")
    with pytest.raises(UsageError, match="max_new_tokens"):
        omni.generate(WORDS, max_tokens=3)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="head8"):
        LowVRAMOmni.from_pretrained(omni.checkpoint.folder, device="cpu", allow=["head9"])
    with (
        pytest.raises(UsageError, match="loaded without speech"),
        LowVRAMOmni.from_pretrained(omni.checkpoint.folder, device="cpu", speech=False) as silent,
    ):
        silent.generate(WORDS, return_audio=True)


def test_a_medium_that_fails_leaves_the_model_usable(omni: LowVRAMOmni, tmp_path: Path) -> None:
    bad = tmp_path / "empty.png"
    bad.touch()
    with pytest.raises(MediaError):
        omni.generate([{"role": "user", "content": [{"type": "image", "image": str(bad)}]}])
    assert omni.generate(WORDS, **SHORT).text


def test_chat_remembers_finished_turns_only(omni: LowVRAMOmni) -> None:
    chat = omni.chat(**SHORT)
    first = chat.send("Hello.")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    cut = chat.stream([{"type": "image", "image": PICTURE}, {"type": "text", "text": "And?"}])
    next(cut)
    cut.close()  # type: ignore[attr-defined]
    assert len(chat.messages) == 2
    second = chat.send([{"type": "image", "image": PICTURE}, {"type": "text", "text": "And?"}])
    assert second.report.prompt_tokens > first.report.prompt_tokens + first.report.reply_tokens
    assert len(chat.messages) == 4


def test_the_plan_before_is_the_plan_of_the_run(omni: LowVRAMOmni) -> None:
    plan = omni.plan(EVERYTHING, **SHORT)
    report = omni.generate(EVERYTHING, **SHORT).report
    assert {row.name: row.predicted_peak_bytes for row in plan.phases} == {
        row.name: row.predicted_peak_bytes for row in report.phases
    }
    assert report.bytes_host_to_device == plan.bytes_to_move


def test_the_next_phase_is_read_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[str] = []
    monkeypatch.setattr(Loader, "expect", lambda self, name: expected.append(name))
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as omni:
        omni.generate(EVERYTHING, **SHORT)
        first, expected[:] = list(expected), []
        omni.generate(EVERYTHING, **SHORT)
    assert first == ["audio", "text", "talker", "token2wav"][: len(first)] and len(first) >= 3
    assert expected == []  # all stay, so there is nothing to read
