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
from lowvram.engine import graph, spans
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
    assert not [note for note in replayed.report.notes if "talker" in note]
    assert recorded[0] >= 4
    monkeypatch.setattr(graph, "recorder_for", lambda device: None)
    with LowVRAMOmni.from_pretrained(folder, device="cuda", dtype=dtype) as omni:
        launched = omni.generate(WORDS, **REPLY)
    for other in (again, launched):
        check_same(replayed, other)


def check_same(one: Result, other: Result) -> None:
    assert one.tokens == other.tokens
    assert one.codes == other.codes
    assert one.audio is not None and other.audio is not None
    np.testing.assert_allclose(one.audio, other.audio, atol=1e-3)


def test_a_recording_keeps_no_more_than_its_share(folder: Path) -> None:
    with LowVRAMOmni.from_pretrained(folder, device="cuda", dtype="bfloat16") as omni:
        plan = omni.plan(WORDS, **REPLY)
        torch.cuda.reset_peak_memory_stats()
        omni.generate(WORDS, **REPLY)
    # Text and Talker, of at most four layers each.
    share = 2 * spans.graph_bytes(4, 1 << 20)
    assert torch.cuda.max_memory_reserved() <= plan.predicted_peak_bytes + share
