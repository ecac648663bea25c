"""Recorded decode steps on a CUDA device: the replies of steps that are launched one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowvram import LowVRAMOmni, Result
from lowvram.engine import spans
from lowvram.engine.graph import CudaRecorder
from lowvram.pocket import make_checkpoint

pytestmark = pytest.mark.gpu

WORDS = [{"role": "user", "content": "Say something."}]
TOKENS, CODES = 20, 100
REPLY: dict[str, Any] = {"max_new_tokens": TOKENS, "max_speech_seconds": CODES / 50}


@pytest.fixture(scope="module", params=[False, True], ids=["16-bit", "awq"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pocket"
    make_checkpoint(path, seed=6, awq=request.param)
    return path


@pytest.fixture(autouse=True)
def _short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "SPAN", 32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_recorded_steps_are_those_that_are_launched(
    dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, recorded = CudaRecorder.record, [0]

    def counted(
        self: CudaRecorder, body: Callable[[], Tensor]
    ) -> tuple[Tensor, Callable[[], None]]:
        recorded[0] += 1
        return record(self, body)

    monkeypatch.setattr(CudaRecorder, "record", counted)
    with LowVRAMOmni.from_pretrained(folder, device="cuda", dtype=dtype) as omni:
        replayed = omni.generate(WORDS, **REPLY)
        again = omni.generate(WORDS, **REPLY)
    assert replayed.report.notes == again.report.notes == ()
    # Of the Talker several in each request, of the Thinker one or more.
    assert recorded[0] >= 8
    monkeypatch.setenv(spans.SWITCH, "0")
    with LowVRAMOmni.from_pretrained(folder, device="cuda", dtype=dtype) as omni:
        launched = omni.generate(WORDS, **REPLY)
    for other in (again, launched):
        check_same(replayed, other)


def check_same(one: Result, other: Result) -> None:
    assert one.tokens == other.tokens
    assert one.codes == other.codes
    assert one.audio is not None and other.audio is not None
    np.testing.assert_allclose(one.audio, other.audio, atol=1e-3)


def test_a_recording_keeps_no_more_than_is_planned(folder: Path) -> None:
    with LowVRAMOmni.from_pretrained(folder, device="cuda", dtype="bfloat16") as omni:
        assert set(omni.plan(WORDS, **REPLY).recorded) == {"text", "talker"}
        report = omni.generate(WORDS, **REPLY).report
    for row in report.phases:
        assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes


def test_another_stream_is_the_current_one_only_while_recording() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before, x = torch.cuda.current_stream(), torch.ones(8, device=device)
    streams = []

    def doubled() -> Tensor:
        streams.append(torch.cuda.current_stream())
        return x * 2

    result, replay = CudaRecorder(device).record(doubled)
    x.fill_(3)
    replay()
    assert result.tolist() == [6.0] * 8
    assert torch.cuda.current_stream() == before
    assert streams[0] == before != streams[1]
