"""Whole requests on a CUDA device: the CPU's replies, within what the driver was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowvram import LowVRAMOmni, Result
from lowvram.offload import Placement
from lowvram.planner import Plan
from lowvram.pocket import make_checkpoint

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
RNG = np.random.default_rng(0)
EVERYTHING = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": RNG.integers(0, 255, (56, 56, 3), dtype=np.uint8)},
            {"type": "audio", "audio": np.sin(np.arange(16_000) / 9).astype(np.float32)},
            {"type": "text", "text": "What is all this? " * 40},
        ],
    }
]
GREEDY: dict[str, Any] = {
    "max_new_tokens": 6,
    "max_speech_seconds": 0.6,
    "talker_temperature": 0.0,
}
SOUND = 0.01
"""Relative error of samples: sums are in another order."""

Change = Callable[[Plan], Plan]


@pytest.fixture(autouse=True)
def _whole_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions do not round their inputs to 10 bits, which greedy choices would show."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module", params=[False, True], ids=["16-bit", "awq"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pocket"
    make_checkpoint(path, seed=5, awq=request.param)
    return path


def reply(folder: Path, device: str, change: Change = lambda plan: plan, **options: Any) -> Result:
    """One reply under a changed plan, the prompt in chunks that have a past."""
    with LowVRAMOmni.from_pretrained(folder, device=device, dtype="float32", **options) as omni:
        plan, chunks = omni._plan, {"text": 64, "talker": 64}
        omni._plan = lambda *of: change(replace(plan(*of), chunks=chunks))  # type: ignore[method-assign]
        return omni.generate(EVERYTHING, **GREEDY)


@pytest.fixture(scope="module")
def wanted(folder: Path) -> Result:
    return reply(folder, "cpu")


def check_close(found: Result, wanted: Result) -> None:
    assert found.tokens == wanted.tokens
    assert found.codes == wanted.codes
    assert found.audio is not None and wanted.audio is not None
    error = np.linalg.norm(found.audio - wanted.audio) / np.linalg.norm(wanted.audio)
    assert error < SOUND


def test_the_reply_is_that_of_the_cpu(folder: Path, wanted: Result) -> None:
    check_close(reply(folder, DEVICE), wanted)


def placements(folder: Path, source: str, every: int) -> dict[str, Placement]:
    """Every n-th unit of both decoders through slabs."""
    found = {}
    with LowVRAMOmni.from_pretrained(folder, device="meta", dtype="float32") as omni:
        for part in ("text", "talker"):
            sizes = omni._loader.unit_bytes(part)
            streamed = tuple(range(0, len(sizes), every))
            found[part] = Placement(
                streamed=streamed,
                slabs=2,
                slab_bytes=max(sizes[i] for i in streamed),
                source=source,  # type: ignore[arg-type]
            )
    return found


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("source", ["pinned", "ring"])
def test_streamed_units_change_nothing(
    source: str, every: int, folder: Path, wanted: Result
) -> None:
    changed = {"placements": placements(folder, source, every)}
    found = reply(folder, DEVICE, lambda plan: replace(plan, **changed))  # type: ignore[arg-type]
    check_close(found, wanted)
    assert found.report.notes == ()


def test_a_cache_on_the_host_changes_nothing(folder: Path, wanted: Result) -> None:
    kv: Any = {"thinker": "host", "talker": "host"}
    check_close(reply(folder, DEVICE, lambda plan: replace(plan, kv=kv)), wanted)


def test_every_budget_is_kept(folder: Path, wanted: Result) -> None:
    """By the allocator's figures, with the context that was measured."""
    with LowVRAMOmni.from_pretrained(folder, device=DEVICE, dtype="float32") as omni:
        plan = omni.plan(EVERYTHING, **GREEDY)
    backend = torch.get_device_module(DEVICE)
    for budget in (plan.minimum_budget_bytes, plan.predicted_peak_bytes + (200 << 20)):
        backend.empty_cache()
        found = reply(folder, DEVICE, max_memory=budget)
        check_close(found, wanted)
        for row in found.report.phases:
            assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes <= budget


def test_memory_is_where_it_was_after_a_request(folder: Path) -> None:
    backend = torch.get_device_module(DEVICE)
    reply(folder, DEVICE)
    backend.empty_cache()
    before = backend.memory_allocated(), backend.memory_reserved()
    reply(folder, DEVICE)
    backend.empty_cache()
    assert (backend.memory_allocated(), backend.memory_reserved()) == before
