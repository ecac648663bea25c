"""Requests one after the other: what the vocoder of the first has made serves all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowvram import LowVRAMOmni, Result
from lowvram.pocket import make_checkpoint

WORDS = [{"role": "user", "content": "Say something."}]
SHORT: dict[str, Any] = {"max_new_tokens": 4, "max_speech_seconds": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pocket"
    make_checkpoint(path, seed=6)
    return path


def planned(omni: LowVRAMOmni, **options: Any) -> tuple[int, Result]:
    """Bytes that the plan says will move, and the reply to the same request."""
    plan = omni.plan(WORDS, **SHORT, **options)
    return plan.bytes_to_move, omni.generate(WORDS, **SHORT, **options)


def test_what_stays_is_neither_read_nor_made_again(folder: Path) -> None:
    with LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory="2GiB") as omni:
        foreseen, first = planned(omni)
        assert foreseen == first.report.bytes_host_to_device > 0
        foreseen, second = planned(omni)
        assert foreseen == second.report.bytes_host_to_device == 0
        assert np.array_equal(first.audio, second.audio)  # type: ignore[arg-type]
        foreseen, other = planned(omni, solver="rk4")
        assert foreseen == other.report.bytes_host_to_device > 0
        for result in (first, second, other):
            assert result.report.measured_peak_bytes <= result.report.predicted_peak_bytes
        held = omni._meter.held()
        assert held["carry"] == omni._constants.nbytes > 0
    assert omni._constants.nbytes == 0 and not any(omni._meter.held().values())


def test_where_they_leave_too_little_room_they_are_made_again(folder: Path) -> None:
    """On the CPU they count: a budget that was enough once is enough again."""
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as omni:
        least = omni.plan(WORDS, **SHORT).minimum_budget_bytes
    with LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory=least) as omni:
        first = omni.generate(WORDS, **SHORT)
        assert not omni.plan(WORDS, **SHORT).fits
        again = omni.generate(WORDS, **SHORT)
        assert np.array_equal(first.audio, again.audio)  # type: ignore[arg-type]
