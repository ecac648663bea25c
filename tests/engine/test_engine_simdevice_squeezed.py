"""Memory that is lost while a request runs on the simulated accelerator: layers begin to stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simdevice as sim
import torch
from simdevice import simulated

from lowvram import DoesNotFitError, LowVRAMOmni, Result
from lowvram.offload.accelerator import FALLBACK_CONTEXT_BYTES
from lowvram.offload.lane import StreamLane
from lowvram.pocket import make_checkpoint

GIB = 1 << 30
WORDS = [{"role": "user", "content": "Say something."}]
SHORT: dict[str, Any] = {"max_new_tokens": 4, "max_speech_seconds": 0.4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pocket"
    make_checkpoint(path, seed=5)
    return path


def opened(folder: Path, *, speech: bool = True) -> LowVRAMOmni:
    sim.reset()
    sim.configure(limit=8 * GIB, context=FALLBACK_CONTEXT_BYTES, others=0)
    return LowVRAMOmni.from_pretrained(folder, device="npu", speech=speech)


def squeezed(omni: LowVRAMOmni, left: int) -> Result:
    """The reply where only so much of the device is left once the request is planned."""
    plan = omni._plan

    def then_taken(*of: Any) -> Any:
        made = plan(*of)
        sim.configure(others=8 * GIB - FALLBACK_CONTEXT_BYTES - left)
        return made

    omni._plan = then_taken  # type: ignore[method-assign]
    try:
        return omni.generate(WORDS, **SHORT)
    finally:
        omni._plan = plan  # type: ignore[method-assign]
        sim.configure(others=0)


def same(one: Result, other: Result) -> bool:
    return (
        one.tokens == other.tokens
        and one.codes == other.codes
        and np.array_equal(one.audio, other.audio)  # type: ignore[arg-type]
    )


@simulated
def test_with_less_and_less_memory_the_reply_is_the_same_or_refused(folder: Path) -> None:
    with opened(folder) as omni:
        roomy = omni.generate(WORDS, **SHORT)
        peak = torch.npu.max_memory_allocated()
    answered, streamed = [], 0
    for share in (0.9, 0.75, 0.7, 0.65, 0.6, 0.55, 0.3, 0.05):
        with opened(folder) as omni:
            try:
                assert same(squeezed(omni, int(peak * share)), roomy)
                answered.append(share)
            except DoesNotFitError as error:
                assert "npu:0 ran out of memory" in str(error)
                assert sim.live_bytes() == 0
            assert torch.npu.max_memory_allocated() <= peak * share
            streamed += omni._loader.bytes_streamed
            assert same(omni.generate(WORDS, **SHORT), roomy)
        assert sim.races() == []
        assert sim.live_bytes() == sim.pinned_bytes() == 0
    assert answered and answered == sorted(answered, reverse=True)
    assert 0.05 not in answered
    assert streamed, "none of these sizes made a layer stream"


@pytest.mark.parametrize("safety", ["after", "wait"])
def test_streaming_without_a_wait_is_found(
    safety: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamLane, safety, lambda lane, mark: None)

    @simulated
    def inside() -> None:
        # Without speech the text model alone sets the peak, and only streaming makes it smaller.
        with opened(folder, speech=False) as omni:
            omni.generate(WORDS, **SHORT)
            peak = torch.npu.max_memory_allocated()
        for share in (0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6):
            with opened(folder, speech=False) as omni:
                try:
                    squeezed(omni, int(peak * share))
                except DoesNotFitError:
                    continue
                if omni._loader.bytes_streamed:
                    assert sim.races()
                    return
        raise AssertionError("none of these sizes made a layer stream")

    inside()
