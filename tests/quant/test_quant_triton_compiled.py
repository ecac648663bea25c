"""Triton's kernels compiled for five kinds of GPU, on a machine without any."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from lowvram.quant.triton import tuning

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton_aot

    return triton_aot


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_what_a_7b_runs_fits_a_processor(capability: int, ahead: ModuleType) -> None:
    assert capability in ahead.CAPABILITIES
    for case in ahead.main_cases():
        row = ahead.compiled(case, capability)
        assert row["cubin_bytes"] > 1000, row
        assert row["spilled_bytes"] == 0 and row["flushed"] == 0, row
        assert row["shared_bytes"] <= ahead.SHARED[capability], row
        assert ahead.programs(row) >= 1, row
        if case.kernel.__name__ == "four_bits":
            assert ahead.programs(row) >= 2, row  # as many as the table wants
            # Every word of a group and its zero points: 128 bits at a time.
            assert row["wide_loads"] >= tuning.gemv(1, 3584, 128).unroll + 1, row


def test_everything_is_launched_up_to_the_driver(tmp_path: Path) -> None:
    """Arguments are bound and specialized, and kernels compiled once, as on a GPU."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "launched_triton.py"), "90"],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    compiled = Counter(run.stdout.split())
    # Split and not; widths that are multiples of 16 words and not.
    assert compiled == {
        "four_bits": 2,
        "four_bits_by_tiles": 2,
        "to_16_bits": 2,
        "add_parts": 1,
        "eight_bits": 1,
    }


def test_a_kernel_that_spills_is_seen(ahead: ModuleType) -> None:
    """What would hold twice as many sums as there are registers."""
    tile = tuning.Gemv(1, 16, 256, 1)
    case = ahead.case(ahead.four_bits, "bf16", "fp16", tile, GROUP=128, DIRECT=False)
    assert ahead.compiled(case, 80)["spilled_bytes"] > 0


def test_the_full_set_has_every_tile_of_the_table(ahead: ModuleType) -> None:
    names = [case.name for case in ahead.all_cases()]
    assert len(set(names)) == len(names) >= 60
    for kernel in ("four_bits ", "four_bits_by_tiles", "to_16_bits", "eight_bits", "add_parts"):
        assert any(name.startswith(kernel) for name in names)
