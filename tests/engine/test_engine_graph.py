"""Recorded decode steps: replayed on other inputs they are the steps themselves."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import simdevice as sim
import torch
from recorder import TapeRecorder
from simdevice import simulated
from torch import Tensor

from lowvram import LowVRAMOmni, Result
from lowvram.engine import graph, spans
from lowvram.engine.passes import DecoderPasses
from lowvram.engine.spans import graph_bytes, span_of
from lowvram.offload import Meter, Placement, open_device
from lowvram.offload.accelerator import FALLBACK_CONTEXT_BYTES
from lowvram.planner import recording
from lowvram.pocket import make_checkpoint
from lowvram.quant import Scratch

WORDS = [{"role": "user", "content": "Say something."}]
TOKENS, CODES = 4, 24
SHORT: dict[str, Any] = {"max_new_tokens": TOKENS, "max_speech_seconds": CODES / 50}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "pocket", seed=6, dtype="float32")


def in_one_place(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(spans, "SPAN", 16)
    for module in (spans, recording):
        patch.setattr(module, "RECORDING", frozenset({"cuda", "npu", "cpu"}))


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps compute in one place on every device, and spans grow often."""
    in_one_place(monkeypatch)


States = list[tuple[str, Tensor]]


def watch_states(patch: pytest.MonkeyPatch) -> States:
    """The part and the last hidden state of every step."""
    step, seen = DecoderPasses.step, []

    def watched(self: DecoderPasses, x: Tensor, position: int) -> Tensor:
        state = step(self, x, position)
        seen.append((self._part, state.clone()))
        return state

    patch.setattr(DecoderPasses, "step", watched)
    return seen


@pytest.fixture(scope="module")
def launched(folder: Path) -> tuple[Result, States]:
    """The reply of steps that compute in one place and are launched one by one; their states."""
    with pytest.MonkeyPatch.context() as patch:
        in_one_place(patch)
        states = watch_states(patch)
        found = reply(folder)
    assert len(found.codes) == CODES
    return found, states


def recording_with(monkeypatch: pytest.MonkeyPatch, recorder: Any) -> Any:
    monkeypatch.setattr(graph, "recorder_for", lambda device: recorder)
    return recorder


def reply(folder: Path, device: str = "cpu", dtype: str = "bfloat16", **options: Any) -> Result:
    with LowVRAMOmni.from_pretrained(folder, device=device, dtype=dtype, **options) as omni:
        return omni.generate(WORDS, **SHORT)


def check_same(one: Result, other: Result) -> None:
    assert one.tokens == other.tokens
    assert one.codes == other.codes
    np.testing.assert_array_equal(one.audio, other.audio)


@pytest.mark.usefixtures("short_spans")
def test_replayed_steps_are_those_that_are_launched_one_by_one(
    folder: Path, launched: tuple[Result, States], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = recording_with(monkeypatch, TapeRecorder())
    states = watch_states(monkeypatch)
    check_same(reply(folder), launched[0])
    for (part, state), (same_part, wanted) in zip(states, launched[1], strict=True):
        assert part == same_part
        assert torch.equal(state, wanted)
    # Every step of both decoders, in a few recordings each.
    assert sum(recorder.replays) == TOKENS - 1 + CODES - 1
    assert len(recorder.replays) >= 3
    assert max(recorder.replays) > 1


@pytest.mark.usefixtures("short_spans")
def test_computing_in_one_place_changes_only_rounding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = reply(folder, dtype="float32")
    monkeypatch.undo()
    plain = reply(folder, dtype="float32")
    assert placed.tokens == plain.tokens
    assert placed.codes == plain.codes


def replanned(omni: LowVRAMOmni, **fields: Any) -> Result:
    """The reply of a plan with these fields replaced."""
    plan = omni._plan
    omni._plan = lambda *of: replace(plan(*of), **fields)  # type: ignore[method-assign]
    return omni.generate(WORDS, **SHORT)


@pytest.mark.usefixtures("short_spans")
def test_streamed_layers_step_as_resident_ones_do(
    folder: Path, launched: tuple[Result, States], monkeypatch: pytest.MonkeyPatch
) -> None:
    states = watch_states(monkeypatch)
    with LowVRAMOmni.from_pretrained(folder, device="cpu", dtype="bfloat16") as omni:
        placements = {}
        for part in ("text", "talker"):
            sizes = omni._loader.unit_bytes(part)
            placements[part] = Placement(
                streamed=tuple(range(len(sizes))), slabs=2, slab_bytes=max(sizes), source="file"
            )
        check_same(replanned(omni, placements=placements), launched[0])
    assert all(torch.equal(x[1], y[1]) for x, y in zip(states, launched[1], strict=True))


@pytest.mark.usefixtures("short_spans")
def test_keys_and_values_that_wait_on_the_host_step_as_others_do(folder: Path) -> None:
    @simulated
    def inside() -> None:
        sim.configure(limit=8 << 30, context=FALLBACK_CONTEXT_BYTES)
        wanted = reply(folder, "npu")
        with LowVRAMOmni.from_pretrained(folder, device="npu", dtype="bfloat16") as omni:
            check_same(replanned(omni, kv={"thinker": "host", "talker": "host"}), wanted)
        assert sim.races() == []

    inside()


class Failing:
    """A recorder that cannot."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def record(self, body: Callable[[], Tensor]) -> Any:
        body()
        raise self.error


@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("operation not permitted when stream is capturing"), "not permitted when"),
    ],
    ids=["memory", "operation"],
)
def test_what_cannot_be_recorded_is_launched_and_told(
    error: Exception,
    reason: str,
    folder: Path,
    launched: tuple[Result, States],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recording_with(monkeypatch, Failing(error))
    found = reply(folder)
    check_same(found, launched[0])
    told = [note for note in found.report.notes if "launched one by one" in note]
    assert [note.split(":")[0] for note in told] == ["text", "talker"]
    assert all(reason in note for note in told)


@pytest.mark.usefixtures("short_spans")
def test_a_recording_is_planned_where_it_has_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts in the rows, and what does not fit is said before, not found out."""
    with LowVRAMOmni.from_pretrained(folder, device="cpu", dtype="bfloat16") as omni:
        whole = omni.plan(WORDS, **SHORT)
    assert set(whole.recorded) == {"text", "talker"}
    for part, step in recording.STEPS.items():
        (row,) = (row for row in whole.phases if step in row.name.split("+"))
        assert row.parts["workspace"] >= whole.recorded[part] > spans.WORKSPACE_BYTES
        assert sum(row.parts.values()) == row.predicted_peak_bytes
    recorder = recording_with(monkeypatch, TapeRecorder())
    monkeypatch.setenv(spans.SWITCH, "0")
    with LowVRAMOmni.from_pretrained(folder, device="cpu", dtype="bfloat16") as omni:
        plain = omni.plan(WORDS, **SHORT)
        off = omni.generate(WORDS, **SHORT)
    assert plain.recorded == {} and recorder.replays == []
    assert sum(f"{spans.SWITCH}=0" in line for line in plain.reasons) == 2
    assert whole.minimum_budget_bytes == plain.minimum_budget_bytes
    monkeypatch.delenv(spans.SWITCH)
    budget = plain.predicted_peak_bytes + (80 << 20)  # the guard, and less than a recording
    with LowVRAMOmni.from_pretrained(
        folder, device="cpu", dtype="bfloat16", max_memory=budget
    ) as omni:
        tight = omni.plan(WORDS, **SHORT)
        check_same(omni.generate(WORDS, **SHORT), off)
    assert tight.recorded == {} and recorder.replays == []
    assert sum("the plan leaves" in line for line in tight.reasons) == 2


@pytest.mark.usefixtures("short_spans")
def test_two_recordings_have_room_beside_each_other_or_one_is_not_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_new_tokens": 40, "max_speech_seconds": 0.8}
    with LowVRAMOmni.from_pretrained(folder, device="cpu", dtype="bfloat16") as omni:
        plan = omni.plan(WORDS, **options)
    assert plan.interleaves("decode", "talk")
    recorder = recording_with(monkeypatch, TapeRecorder())
    # The guard of 64 MiB, and room for one and a half.
    budget = plan.predicted_peak_bytes + (64 << 20) - plan.recorded["talker"] // 2
    with LowVRAMOmni.from_pretrained(
        folder, device="cpu", dtype="bfloat16", max_memory=budget
    ) as omni:
        found = omni.plan(WORDS, **options)
        omni.generate(WORDS, **options)
    assert set(found.recorded) == {"text"}
    assert recorder.replays
    (told,) = (line for line in found.reasons if "launched one by one" in line)
    assert told.startswith("talker:") and "the plan leaves" in told


def test_what_is_recorded_is_forgotten_with_its_part(
    folder: Path, short_spans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later phase, or request, does not count what is no longer there."""
    recording_with(monkeypatch, TapeRecorder())
    held: list[int] = []
    forget = graph.StepGraph.forget

    def watched(self: graph.StepGraph) -> None:
        held.append(self._context.meter.held().get("workspace", 0))
        forget(self)

    monkeypatch.setattr(graph.StepGraph, "forget", watched)
    with LowVRAMOmni.from_pretrained(folder, device="cpu", dtype="bfloat16") as omni:
        omni.generate(WORDS, **SHORT)
        assert max(held) > spans.WORKSPACE_BYTES
        assert omni._meter.held().get("workspace", 0) == 0


class Bare:
    """What a `StepGraph` asks of a request's context."""

    def __init__(self) -> None:
        self.plan = SimpleNamespace(recorded={"text": 1 << 20})
        self.device, self.scratch = open_device("cpu"), Scratch()
        self.meter, self.recorded = Meter(self.device), dict[str, Any]()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Once:
    """A recorder whose replays do nothing."""

    def record(self, body: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        return body(), lambda: None


@pytest.mark.parametrize("nbytes", [1 << 10, spans.SUMS_BYTES + 64])
def test_memory_that_a_recording_goes_on_using_is_nobody_elses(
    nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scratch is given back after every phase: that of a recorded step stays, as long as the step
    does, or there is so much of it that the step is not recorded."""
    recording_with(monkeypatch, Once())
    context: Any = Bare()
    steps = graph.StepGraph(context, "text")
    small = nbytes <= spans.SUMS_BYTES

    def body() -> Tensor:
        (sums,) = context.scratch.take(torch.device("cpu"), ((nbytes,), torch.uint8))
        return sums.fill_(1)

    steps.run(body, 16)
    kept = weakref.ref(context.scratch.buffer.untyped_storage())
    context.scratch.free()
    assert (kept() is not None) == small
    assert bool(context.notes) != small
    steps.forget()
    assert kept() is None


def test_spans_hold_the_token_that_comes_and_end_with_the_cache() -> None:
    for most in (1, 1000, 1024, 5000):
        for tokens in range(1, most + 1):
            span = span_of(tokens, most)
            assert tokens <= span <= most
            assert span == most or (span % 1024 == 0 and span - tokens < 1024)


def test_the_share_of_a_recording_grows_with_the_model() -> None:
    sizes = [graph_bytes(layers, step) for layers, step in ((2, 0), (24, 1 << 20), (28, 5 << 20))]
    assert sizes == sorted(sizes)
    assert sizes[0] > spans.WORKSPACE_BYTES + spans.SUMS_BYTES
    assert sizes[-1] < 64 << 20


def test_no_device_but_cuda_computes_in_one_place(folder: Path) -> None:
    for name in ("cpu", "meta"):
        with LowVRAMOmni.from_pretrained(folder, device=name) as omni:
            assert not spans.in_place(name, 10)
            assert graph.recorder_for(omni._device) is None
            assert omni.plan(WORDS).recorded == {}
    assert spans.in_place("cuda", spans.LONGEST) and not spans.in_place("cuda", 8193)


def test_each_step_sees_a_span_that_grows_with_what_is_filled(
    folder: Path, short_spans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[tuple[int, int]]] = {"text": [], "talker": []}
    step = DecoderPasses.step

    def watched(self: DecoderPasses, x: Tensor, position: int) -> Tensor:
        result = step(self, x, position)
        bias = self._cache.bias
        assert bias is not None
        seen[self._part].append((self.filled, int(bias.isfinite().sum())))
        assert len(bias) == span_of(self.filled, self._cache.max_tokens)
        return result

    monkeypatch.setattr(DecoderPasses, "step", watched)
    reply(folder)
    for steps in seen.values():
        assert steps and all(filled == shown for filled, shown in steps)
