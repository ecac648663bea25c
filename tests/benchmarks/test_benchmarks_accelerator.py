"""The accelerator's benchmark, small: on the CPU, and on the simulated device."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import simdevice as sim
import torch
from simdevice import simulated

from lowvram.offload.accelerator import FALLBACK_CONTEXT_BYTES

FOLDER = Path(__file__).parents[2] / "benchmarks"
GIB = 1 << 30
SMALL = ["--model", "pocket", "--seconds", "1", "--max-tokens", "3", "--max-speech", "0.2"]
SMALL += ["--product-seconds", "0"]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import what lies beside them."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


def result(path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the numbers of a run in this process."""
    import accelerator

    code = accelerator.main([*SMALL, "--json", str(path), *arguments], accelerator.run_job)
    return code, json.loads(path.read_text(encoding="utf-8"))


def check_products(rows: list[dict[str, Any]], kernel: str) -> None:
    """A rate, two phases of four linears, and the head."""
    rate, *linears, head = rows
    assert rate["copy_bytes_per_s"] > 0
    assert [row["phase"] for row in linears] == ["decode", "prefill"] * 4
    assert [row["rows"] for row in linears] == [1, 2048] * 4
    for row in linears:
        assert row["seconds"][kernel] > 0 and row["seconds"]["reference"] > 0
        seconds = row.get("bound_s") or row["dense_s"]
        beside = row.get("of_bound") or row["of_dense"]
        assert beside[kernel] == pytest.approx(seconds / row["seconds"][kernel])
    assert head["linear"] == "lm_head" and set(head["seconds"]) == {"16 bits", "8 bits"}


def test_products_on_meta_take_nothing() -> None:
    from accelerator_kernels import kernels

    rows = list(kernels("pocket", "meta", 0.0))
    check_products(rows, "reference")


def test_on_the_cpu(tmp_path: Path) -> None:
    code, told = result(tmp_path / "new" / "a.json", "--device", "cpu", "--budget", "1GiB", "1MiB")
    assert code == 0
    assert told["copies"]["streamed_bytes_per_s"] > 0 < told["copies"]["plain_copy_bytes_per_s"]
    check_products(told["products"], "cpu")
    answered, refused = told["requests"]
    assert answered["prompt_tokens"] == 781
    assert answered["reply_tokens"] == 3
    assert answered["audio_seconds"] == pytest.approx(0.2)
    assert answered["sound"] == "noise"
    assert 0 < answered["measured_peak_bytes"] <= answered["predicted_peak_bytes"] <= GIB
    assert 0 < answered["first_text_s"] < answered["first_audio_s"] <= answered["total_s"]
    assert answered["decode_tokens_per_s"] > 0
    assert not refused["fits"]
    assert refused["minimum_budget_bytes"] == told["minimum_budget_bytes"]["1"]


def test_on_the_simulated_device(tmp_path: Path) -> None:
    @simulated
    def inside() -> None:
        sim.reset()
        sim.configure(limit=GIB, context=FALLBACK_CONTEXT_BYTES)
        code, told = result(tmp_path / "a.json", "--device", "npu", "--budget", "minimum")
        assert code == 0
        (row,) = told["requests"]
        budget = row["budget_bytes"]
        # Another process may find another context.
        assert 0 < budget - told["minimum_budget_bytes"]["1"] < 16 << 20
        assert row["sound"] == "noise"
        allocator = FALLBACK_CONTEXT_BYTES + torch.npu.max_memory_reserved()
        assert allocator <= row["driver_peak_bytes"] <= row["predicted_peak_bytes"] <= budget
        assert sim.races() == []

    inside()


def test_what_would_take_too_long_is_left_out(tmp_path: Path) -> None:
    import accelerator

    asked: list[Sequence[str]] = []

    def ask(job: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
        asked.append(job)
        if job[0] == "facts":
            yield {"device": "x", "device_name": "x", "minimum_budget_bytes": {"1": 1 << 20}}
        elif job[0] == "copies":
            yield {"left_out": "ended, its time was over"}

    arguments = [*SMALL, "--time-limit", "10", "--budget", "1GiB", "minimum"]
    path = tmp_path / "a.json"
    assert accelerator.main([*arguments, "--json", str(path)], ask) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["requests"]
    assert [row["left_out"] for row in rows] == ["no time left"] * 2
    assert [row["budget_bytes"] for row in rows] == [GIB, accelerator.APART + (1 << 20)]
    assert [job[0] for job in asked] == ["facts", "copies"]


def test_a_request_above_its_budget_fails_the_run() -> None:
    import accelerator

    well = {"budget_bytes": 10, "driver_peak_bytes": 10, "sound": "noise"}
    assert not accelerator.broken(well)
    assert not accelerator.broken({"budget_bytes": 10, "fits": False})
    assert accelerator.broken(well | {"driver_peak_bytes": 11})
    assert accelerator.broken(well | {"sound": "nan"})
    assert accelerator.broken({"budget_bytes": 10, "failed": "it ended with 1"})


def test_a_job_in_a_process_of_its_own() -> None:
    import accelerator

    job = ["unknown", "pocket", "cpu", "3", "0.2"]
    assert list(accelerator.children(job, 0.0)) == [{"left_out": "ended, its time was over"}]
