"""Triton's kernels interpreted in a process of their own, and when they are chosen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowvram.quant import (
    Kernel,
    QuantLinear,
    apply_all,
    join,
    linear_bytes,
    loading_bytes,
    preferred_kernel,
    scratch_bytes,
)
from lowvram.quant.kernels import Problem, reference, select, triton
from lowvram.quant.kernels.pieces import piece_columns
from lowvram.quant.sizes import PIECE_WEIGHTS
from lowvram.quant.triton import lacking, offered, tuning
from lowvram.specs import SPECS, Spec
from lowvram.tensors import thinker_linears

HERE = Path(__file__).parent
CASES = 100


def test_the_interpreted_kernels() -> None:
    """Triton is told to interpret before it is imported: elsewhere it has to compile."""
    # Overflow is what some of them are about. One `-v` undoes the `-q` of the configuration.
    plain = ("-v", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::RuntimeWarning")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *plain, str(HERE / "interpreted_triton.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= CASES, run.stdout


def test_what_is_refused_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(dtype: torch.dtype = torch.float16, *shape: int) -> str:
        return str(triton.refusal(Problem("cuda", dtype, *(shape or (256, 64, 128)))))

    assert "not in torch.float32" in why(torch.float32)
    assert "256 inputs in groups of 16" in why(torch.float16, 256, 64, 16)
    assert "not packed as it reads" in why(torch.float16, 200, 64, 128)
    assert "not packed as it reads" in why(torch.float16, 256, 60, 128)
    assert why() == "CUDA cannot be used on this machine"
    opened(monkeypatch, (7, 5))
    assert why() == "they need compute capability 8.0, not 7.5"
    opened(monkeypatch, (8, 0))
    triton._failed.cache_clear()
    # What a driver says to a device that is none is one reason among many.
    assert why().startswith("a small product failed: ")
    triton._failed.cache_clear()
    monkeypatch.setattr(triton, "_failed", lambda dtype, device: None)
    assert triton.refusal(Problem("cuda", torch.float16, 256, 64, 128)) is None
    assert select(Problem("cuda", torch.bfloat16, 256, 64, 128)).name == "triton"
    monkeypatch.setenv(offered.SWITCH, "0")
    assert why() == "LOWVRAM_TRITON=0"


def opened(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """As if a GPU was there, and opened in this process."""
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_a_device_that_is_open_is_asked_before_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes the place of the kernels may take more memory: a plan has to know."""
    opened(monkeypatch, (7, 5))
    for dtype in ("bfloat16", "float16"):
        chosen = preferred_kernel("cuda", dtype)
        assert chosen.name == "reference" and "capability 8.0, not 7.5" in chosen.reason
    opened(monkeypatch, (9, 0))
    monkeypatch.setattr(triton, "_failed", lambda dtype, device: f"{dtype} failed")
    chosen = preferred_kernel("cuda", "bfloat16")
    assert chosen.name == "tinygemm" and "torch.bfloat16 failed" in chosen.reason
    chosen = preferred_kernel("cuda", "float16")
    assert chosen.name == "reference" and "torch.float16 failed" in chosen.reason
    monkeypatch.setattr(triton, "_failed", lambda dtype, device: None)
    assert preferred_kernel("cuda", "float16").name == "triton"


def test_a_device_that_is_full_is_no_failure_of_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*given: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    opened(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.Tensor, "to", full)
    triton._failed.cache_clear()
    with pytest.raises(torch.OutOfMemoryError):
        triton._failed(torch.bfloat16, torch.device("cpu"))
    assert preferred_kernel("cuda", "bfloat16").name == "triton"
    monkeypatch.undo()
    opened(monkeypatch, (9, 0))
    monkeypatch.setattr(triton, "run", reference.run)
    assert triton._failed(torch.bfloat16, torch.device("cpu")) is None  # it was not remembered
    triton._failed.cache_clear()


def test_a_wrong_result_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    run = reference.run
    for spoil, said in ((1.0, None), (1.5, "a small product came out wrong")):
        monkeypatch.setattr(triton, "run", lambda *given, s=spoil: run(*given).mul_(s))
        triton._failed.cache_clear()
        assert triton._failed(torch.bfloat16, device) == said
    triton._failed.cache_clear()


@pytest.mark.parametrize("missing", ["triton", "compiler", "headers"])
def test_what_a_machine_with_a_driver_lacks(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offered, "_driver", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(offered, "_installed", lambda: missing != "triton")
    monkeypatch.setattr(offered, "_headers", lambda: missing != "headers")
    monkeypatch.setattr(
        offered.shutil, "which", lambda name: None if missing == "compiler" else name
    )
    said = {"triton": "not installed", "compiler": "no C compiler", "headers": "python3-dev"}
    assert said[missing] in str(lacking())
    brain, half = (preferred_kernel("cuda", dtype) for dtype in ("bfloat16", "float16"))
    assert brain.name == "tinygemm" and said[missing] in brain.reason
    assert half.name == "reference" and said[missing] in half.reason
    monkeypatch.setattr(offered, "_driver", lambda: False)  # a plan for another machine
    assert preferred_kernel("cuda", "float16").name == "triton"


def test_this_machine_has_what_triton_builds_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offered, "_driver", lambda: True)
    assert lacking() is None


def test_only_16_bits_are_for_it() -> None:
    for dtype, name in (("bfloat16", "triton"), ("float16", "triton"), ("float32", "reference")):
        assert preferred_kernel("cuda", dtype).name == name
        assert preferred_kernel("cuda", dtype, "reference").name == "reference"


def test_streamed_weights_run_on_cuda_as_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `after_load`; what is on the way back to the host computes with the reference."""
    monkeypatch.setattr(triton, "refusal", lambda problem: None)
    for dtype in (torch.float16, torch.bfloat16):
        layer = QuantLinear(256, 64, False, 128, dtype=dtype)
        assert layer.kernel.name == "reference"
        assert layer._as_stored("cuda").name == "triton"
        assert layer._as_stored("cpu").name == "reference"
        x = torch.zeros(1, 256, dtype=dtype)
        assert layer(x).shape == (1, 64) and layer.kernel.name == "reference"


def test_nothing_is_brought_into_another_layout() -> None:
    layer = QuantLinear(256, 64, False, 128)
    stored = [layer.get_buffer(name) for name in ("qweight", "qzeros", "scales")]
    held = triton.prepare(*stored, 128)
    assert all(one is other for one, other in zip(held.values(), stored, strict=True))
    assert set(triton.JOINS) == set(held)
    assert sum(tensor.nbytes for tensor in stored) == linear_bytes(256, 64, 128, "triton")
    # Of joined ones, which are copied.
    assert loading_bytes(256, 64, 128, "triton") > sum(tensor.nbytes for tensor in stored)


def packed(outputs: int) -> QuantLinear:
    layer = QuantLinear(128, outputs, True, 64, dtype=torch.bfloat16)
    random = torch.Generator().manual_seed(outputs)
    for name in ("qweight", "qzeros"):
        words = layer.get_buffer(name)
        words.copy_(torch.randint(-(2**31), 2**31, words.shape, generator=random).int())
    layer.get_buffer("scales").copy_(torch.rand(2, outputs, generator=random))
    layer.get_buffer("bias").copy_(torch.rand(outputs, generator=random))
    return layer


def test_words_lie_side_by_side_where_linears_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the loader does it: children after their parent, and again after a drop."""
    kernel = Kernel("triton", "", triton.prepare, reference.run, triton.JOINS, gated=triton.gated)
    monkeypatch.setattr(QuantLinear, "choose", lambda self, device: kernel)
    apart = [packed(outputs) for outputs in (64, 16, 24)]
    layers = [packed(outputs) for outputs in (64, 16, 24)]
    held = sum(tensor.nbytes for layer in layers for tensor in layer.buffers())
    assert layers[0].keeps_stored("cuda")  # the loader lets them lie in one block
    join(layers)
    for layer in layers:
        layer.after_load()
    assert layers[0].joined == (64, 16, 24)
    assert sum(tensor.nbytes for layer in layers for tensor in layer.buffers()) == held
    x = torch.randn(3, 128).bfloat16()
    for found, one in zip(apply_all(layers, x), apart, strict=True):
        torch.testing.assert_close(found, one(x), rtol=8e-3, atol=1e-2)
    layers[0].as_built()
    assert layers[0].joined == ()


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_scratch_is_enough_for_whoever_computes(spec: Spec) -> None:
    """Weights to be multiplied by cuBLAS, sums of parts, and the reference where it is refused;
    of what streams, which is not joined, no more than the reference would take."""
    layer = {dims[:2] for dims in thinker_linears(spec.config.thinker).values()}
    for inputs, outputs in layer | {(inputs, 2 * outputs) for inputs, outputs in layer}:
        for group in (32, 64, 128):
            if inputs % group:
                continue
            planned = scratch_bytes(inputs, outputs, "triton", group)
            assert planned == scratch_bytes(inputs, outputs, "reference", group)
            step = 4 * piece_columns(PIECE_WEIGHTS["triton"], inputs, 8)
            assert 2 * inputs * min(step, outputs) + 64 <= planned
            for count in (1, 8, 64):
                most = tuning.most_splits(inputs, outputs, group, count)
                assert most >= 1
                tiles = -(-outputs // 256)
                for processors in (20, 132, 10_000):
                    splits, each = tuning.splits(tiles, inputs // group, processors, most)
                    assert splits * each >= inputs // group > (splits - 1) * each
                    assert splits * count * outputs * 4 <= planned


def test_there_are_programs_enough_for_an_h200() -> None:
    """Of the 7B's linears, joined as they are: four for each of 132 processors, or one a group."""
    for inputs, outputs in ((3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)):
        tile = tuning.gemv(1, outputs, 128)
        tiles = -(-outputs // (8 * tile.words))
        most = tuning.most_splits(inputs, outputs, 128, 1)
        splits, each = tuning.splits(tiles, inputs // 128, 132, most)
        assert each == 1 or 4 * 132 <= tiles * splits < 8 * 132
        assert tile.inputs * tile.words * 4 * tile.unroll == 16 << 10  # bytes under way


def test_nothing_imports_triton_without_a_device() -> None:
    code = (
        "import sys, lowvram.quant as q, lowvram.quant.kernels.triton;"
        "q.preferred_kernel('cuda', 'float16'); assert 'torch' in sys.modules;"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parents[1])
