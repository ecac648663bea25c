"""The benchmark in processes of its own: the peak that the driver sees is within the budget."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lowvram.offload import guard_bytes

pytestmark = pytest.mark.gpu

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_the_driver_sees_no_more_than_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    import accelerator

    path = tmp_path / "a.json"
    arguments = ["--model", "pocket", "--device", "cuda", "--seconds", "2", "--json", str(path)]
    budgets = ["--budget", "2GiB", "minimum"]
    replies = ["--max-tokens", "8", "--max-speech", "0.5"]
    assert accelerator.main([*arguments, *budgets, *replies]) == 0
    told = json.loads(path.read_text(encoding="utf-8"))
    assert len(told["requests"]) == 2
    for row in told["requests"]:
        assert row["fits"] and row["sound"] == "noise"
        predicted, budget = row["predicted_peak_bytes"], row["budget_bytes"]
        # The guard is for kernels that are loaded late, which no allocator knows of.
        assert predicted + guard_bytes(budget) <= budget
        assert row["measured_peak_bytes"] <= predicted
        assert row["driver_peak_bytes"] <= predicted + guard_bytes(budget)
    copied = told["copies"]
    assert 0 < copied["streamed_bytes_per_s"] <= 1.1 * copied["plain_copy_bytes_per_s"]
