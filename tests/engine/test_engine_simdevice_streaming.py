"""Requests whose layers stream and whose cache waits on the host, on the simulated accelerator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simdevice as sim
import torch
from simdevice import simulated

from lowvram import DeviceError, LowVRAMOmni, Result
from lowvram.models import attention as attention_module
from lowvram.offload import Placement
from lowvram.offload.accelerator import FALLBACK_CONTEXT_BYTES
from lowvram.offload.lane import StreamLane
from lowvram.planner import Plan
from lowvram.pocket import make_checkpoint

WORDS = [{"role": "user", "content": "Say something. " * 20}]
SHORT: dict[str, Any] = {"max_new_tokens": 4, "max_speech_seconds": 0.2}

Change = Callable[[LowVRAMOmni, Plan], Plan]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pocket"
    make_checkpoint(path, seed=5, awq=True)
    return path


def opened(folder: Path, device: str, change: Change = lambda omni, plan: plan) -> LowVRAMOmni:
    omni = LowVRAMOmni.from_pretrained(folder, device=device, dtype="bfloat16", kernel="reference")
    make = omni._plan
    chunks = {"text": 64, "talker": 64}
    omni._plan = lambda *of: change(omni, replace(make(*of), chunks=chunks))  # type: ignore[method-assign]
    return omni


@pytest.fixture(scope="module")
def wanted(folder: Path) -> Result:
    """The CPU's reply with everything resident, its attention in blocks as on an NPU."""

    def blockwise(q: Any, k: Any, v: Any, scale: float) -> torch.Tensor:
        return attention_module.blockwise(q, k, v, causal=True, scale=scale)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, opened(folder, "cpu") as omni:
        patch.setattr(attention_module, "_causal_cpu", blockwise)
        reply = omni.generate(WORDS, **SHORT)
    torch.set_num_threads(threads)
    return reply


def streaming(source: Any, every: int, kv: Any) -> Change:
    """Every so-manieth unit of both decoders from `source`, their caches in `kv`."""

    def change(omni: LowVRAMOmni, plan: Plan) -> Plan:
        placements = {}
        for part in ("text", "talker"):
            sizes = omni._loader.unit_bytes(part)
            streamed = tuple(range(0, len(sizes), every))
            largest = max(sizes[i] for i in streamed)
            placements[part] = Placement(
                streamed=streamed, slabs=2, slab_bytes=largest, source=source
            )
        return replace(plan, placements=placements, kv={"thinker": kv, "talker": kv})

    return change


def check(folder: Path, wanted: Result, change: Change) -> None:
    sim.reset()
    sim.configure(limit=8 << 30, context=FALLBACK_CONTEXT_BYTES)
    with opened(folder, "npu", change) as omni:
        for _ in range(2):
            reply = omni.generate(WORDS, **SHORT)
            assert (reply.tokens, reply.codes) == (wanted.tokens, wanted.codes)
            assert np.array_equal(reply.audio, wanted.audio)  # type: ignore[arg-type]
            assert not reply.report.notes


@pytest.mark.parametrize("kv", ["device", "host"])
@pytest.mark.parametrize(("source", "every"), [("pinned", 1), ("ring", 1), ("ring", 2)])
def test_streaming_gives_the_cpus_reply_without_a_race(
    source: str, every: int, kv: str, folder: Path, wanted: Result
) -> None:
    @simulated
    def inside() -> None:
        check(folder, wanted, streaming(source, every, kv))
        assert sim.races() == []
        assert sim.live_bytes() == sim.pinned_bytes() == 0

    inside()


@pytest.mark.parametrize("left_out", ["wait", "after_compute"])
def test_a_cache_on_the_host_needs_each_of_its_waits(
    left_out: str, folder: Path, wanted: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamLane, left_out, lambda *of: None)

    @simulated
    def inside() -> None:
        check(folder, wanted, streaming("pinned", 100, "host"))
        assert sim.races() != []

    inside()


@pytest.mark.parametrize("kv", ["device", "host"])
def test_host_memory_that_cannot_be_pinned_costs_speed_or_is_told(
    kv: str, folder: Path, wanted: Result
) -> None:
    """Each pinned allocation of a request fails in turn."""

    @simulated
    def inside() -> None:
        seen = set()
        for n in range(1, 12):
            sim.reset()
            sim.configure(limit=8 << 30, context=FALLBACK_CONTEXT_BYTES)
            with opened(folder, "npu", streaming("pinned", 2, kv)) as omni:
                sim.fail_allocation(n, pinned=True)
                try:
                    reply = omni.generate(WORDS, **SHORT)
                except DeviceError as error:
                    assert "of pinned host memory could be had for the keys" in str(error)
                    seen.add("refused")
                else:
                    assert (reply.tokens, reply.codes) == (wanted.tokens, wanted.codes)
                    seen.add("slower" if reply.report.notes else "planned")
                sim.reset()
                assert omni.generate(WORDS, **SHORT).codes == wanted.codes
            assert sim.races() == []
            assert sim.live_bytes() == sim.pinned_bytes() == 0
        assert seen == {"slower", "planned"} | ({"refused"} if kv == "host" else set())

    inside()
