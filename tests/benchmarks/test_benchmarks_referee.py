"""The referee on the built-in model: a reply within its budget, under the system's limit."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.pocket import make_checkpoint

FOLDER = Path(__file__).parents[2] / "benchmarks"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import what lies beside them."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "awq", seed=5, awq=True)


def _inside(pipe: Connection, folder: Path, budget: int, room: int) -> None:
    import referee

    torch.set_num_threads(1)  # threads of the parent's pool are not there
    warnings.simplefilter("ignore")  # the budget is lowered to what the limit leaves
    limit = referee.share(folder) + room
    pipe.send(referee.work(folder, budget, limit, 6, 0.5))


def judged(folder: Path, budget: int, room: int) -> dict[str, Any]:
    """`work` in a process of its own, which may take `room` bytes more than it began with."""
    mine, theirs = multiprocessing.Pipe()
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=_inside, args=(theirs, folder, budget, room))
    child.start()
    theirs.close()
    found: dict[str, Any] = mine.recv()
    child.join()
    return found


def test_a_reply_within_its_budget_lives(folder: Path) -> None:
    row = judged(folder, 128 * MIB, 128 * MIB)
    assert row["fits"] and row["text"]
    assert row["audio_seconds"] == pytest.approx(0.5)
    assert 0 < row["measured_peak_bytes"] <= row["predicted_peak_bytes"] <= 128 * MIB


def test_a_budget_that_does_not_fit_is_refused(folder: Path) -> None:
    row = judged(folder, 2 * MIB, 128 * MIB)
    assert not row["fits"]
    assert row["error"].startswith("does not fit in 2 MiB: ")


def test_a_limit_below_the_budget_is_seen(folder: Path) -> None:
    """The limit is set, for without it the whole budget would be used."""
    row = judged(folder, 128 * MIB, 40 * MIB)
    assert not row["fits"]
    assert 20 * MIB < row["plan"]["budget_bytes"] < 40 * MIB
