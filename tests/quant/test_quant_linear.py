"""The 4-bit linear: exact against `(q - zero) * scale`, whatever the type, device and pieces."""

from __future__ import annotations

import contextvars
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram.quant import (
    Problem,
    QuantLinear,
    current_phase,
    dequantize,
    kernel_phase,
    linear_bytes,
    quantize,
    select,
    sizes,
    unpack,
)
from lowvram.quant.kernels import cpu, reference
from lowvram.quant.kernels.pieces import piece_columns

SHAPES = [(256, 64, 128), (128, 192, 64), (96, 128, 32)]
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def filled(
    inputs: int, outputs: int, group: int, **options: object
) -> tuple[QuantLinear, Tensor, Tensor]:
    """A layer with random weights, and those weights [N, K] and its bias in float32."""
    rng = np.random.default_rng(inputs + outputs)
    packed = quantize(rng.standard_normal((outputs, inputs)).astype(np.float32), group)
    layer = QuantLinear(inputs, outputs, True, group, **options)  # type: ignore[arg-type]
    bias = torch.from_numpy(rng.standard_normal(outputs).astype(np.float32)).to(layer.dtype)
    layer.qweight.copy_(torch.from_numpy(packed.qweight))
    layer.qzeros.copy_(torch.from_numpy(packed.qzeros))
    layer.scales.copy_(torch.from_numpy(packed.scales))
    layer.get_buffer("bias").copy_(bias)
    scales = layer.scales.float().numpy()
    weights = dequantize(packed.qweight, packed.qzeros, scales, group)
    return layer, torch.from_numpy(weights.T.copy()), bias.float()


def error(found: Tensor, x: Tensor, weights: Tensor, bias: Tensor) -> float:
    exact = F.linear(x.double(), weights.double(), bias.double())
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("scales_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_agrees_with_the_formula(
    shape: tuple[int, int, int], dtype: torch.dtype, scales_dtype: torch.dtype, kernel: str
) -> None:
    options = {"dtype": dtype, "scales_dtype": scales_dtype, "kernel": kernel}
    layer, weights, bias = filled(*shape, **options)
    x = torch.randn(2, 5, shape[0], generator=torch.Generator().manual_seed(0)).to(dtype)
    assert error(layer(x), x, weights, bias) < BOUND[dtype]
    layer.after_load()
    for phase in ("prefill", "decode"):
        with kernel_phase(phase):
            out = layer(x)
            assert out.dtype == dtype and out.shape == (2, 5, shape[1])
            assert error(out, x, weights, bias) < BOUND[dtype]
            assert error(layer(x[:1, :1]), x[:1, :1], weights, bias) < 2 * BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_reference_computes_what_the_dequantized_checkpoint_would(dtype: torch.dtype) -> None:
    layer, weights, bias = filled(256, 64, 128, dtype=dtype, kernel="reference")
    unpacked = reference.dequantize(layer.qweight, layer.qzeros, layer.scales, 128)
    assert torch.equal(unpacked.T, weights)  # before rounding to the type: bit for bit
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = F.linear(x, weights.to(dtype), bias.to(dtype))
    # The same products in the same type; only the order of a sum may differ.
    atol = BOUND[dtype] * float(expected.abs().max())
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=atol)
    assert (layer(x) == expected).float().mean() > (0.1 if dtype == torch.float32 else 0.95)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, weights, bias = filled(128, 192, 64, dtype=dtype)
    pieced, *_ = filled(128, 192, 64, dtype=dtype)
    x = torch.randn(9, 128).to(dtype)
    whole.after_load()
    expected = whole(x)
    for kernel in ("reference", "cpu"):
        monkeypatch.setitem(sizes.PIECE_WEIGHTS, kernel, 128 * 72)
    assert piece_columns(128 * 72, 128, 8) == 72
    assert piece_columns(128 * 72, 10**9, 64) == 64
    pieced.after_load()
    assert error(pieced(x), x, weights, bias) < BOUND[dtype]
    torch.testing.assert_close(pieced(x), expected)
    for name, held in whole.named_buffers():
        assert torch.equal(held, pieced.get_buffer(name)), name


def test_one_copy_of_the_weights_and_its_size() -> None:
    for dtype, kernel in ((torch.float32, "reference"), (torch.bfloat16, "cpu")):
        layer, *_ = filled(256, 64, 128, dtype=dtype)
        stored = sum(b.nbytes for n, b in layer.named_buffers() if n != "bias")
        assert stored == linear_bytes(256, 64, 128)
        layer.after_load()
        assert layer.kernel.name == kernel
        held = sum(b.nbytes for n, b in layer.named_buffers() if n != "bias")
        assert held == linear_bytes(256, 64, 128, kernel)  # type: ignore[arg-type]


def test_stored_types_are_pinned() -> None:
    layer = QuantLinear(128, 8, False, 128, dtype=torch.bfloat16, scales_dtype=torch.float16)
    assert {n: b.dtype for n, b in layer.named_buffers()} == layer.stored_dtypes
    assert layer.stored_dtypes["scales"] == torch.float16


def test_runs_on_meta_without_values() -> None:
    with torch.device("meta"):
        layer = QuantLinear(18944, 3584, False, 128, dtype=torch.bfloat16)
    layer.after_load()
    assert layer.kernel.name == "reference"
    out = layer(torch.empty(1, 300, 18944, dtype=torch.bfloat16, device="meta"))
    assert out.shape == (1, 300, 3584) and out.device.type == "meta"


@pytest.mark.parametrize(("inputs", "outputs"), [(100, 64), (128, 12)])
def test_shapes_that_cannot_be_packed(inputs: int, outputs: int) -> None:
    with pytest.raises(ValueError, match="cannot be packed"):
        QuantLinear(inputs, outputs, False, 64)


def test_phases_nest_and_belong_to_their_context() -> None:
    assert current_phase() == "prefill"
    with kernel_phase("decode"):
        assert current_phase() == "decode"
        with kernel_phase("prefill"):
            assert current_phase() == "prefill"
        assert current_phase() == "decode"
        assert contextvars.Context().run(current_phase) == "prefill"
    with pytest.raises(RuntimeError), kernel_phase("decode"):
        raise RuntimeError
    assert current_phase() == "prefill"


def test_the_phase_chooses_the_kernel_and_the_rows_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, *_ = filled(256, 64, 128, dtype=torch.bfloat16)
    layer.after_load()
    products: list[int] = []
    pieces = cpu.by_pieces
    monkeypatch.setattr(
        cpu, "by_pieces", lambda x, *rest: products.append(len(x)) or pieces(x, *rest)
    )
    for rows in (1, 33):
        layer(torch.zeros(rows, 256, dtype=torch.bfloat16))
    assert products == [1, 33]
    with kernel_phase("decode"):
        for rows in (1, 33):
            layer(torch.zeros(rows, 256, dtype=torch.bfloat16))
    assert products == [1, 33]


@pytest.mark.parametrize(
    ("problem", "asked", "name", "reason"),
    [
        (Problem("cpu", torch.bfloat16, 256, 64, 128), "auto", "cpu", "4-bit product"),
        (Problem("cpu", torch.bfloat16, 256, 64, 128), "reference", "reference", "asked for"),
        (Problem("cpu", torch.float32, 256, 64, 128), "auto", "reference", "not in float32"),
        (
            Problem("cuda", torch.bfloat16, 256, 64, 128),
            "auto",
            "reference",
            "triton kernel cannot: CUDA",
        ),
        (Problem("npu", torch.bfloat16, 256, 64, 128), "auto", "reference", "no NPU is open"),
        (Problem("cpu", torch.bfloat16, 256, 80, 128), "auto", "reference", "80 outputs"),
    ],
)
def test_the_choice_and_its_reason(problem: Problem, asked: str, name: str, reason: str) -> None:
    kernel = select(problem, asked)  # type: ignore[arg-type]
    assert kernel.name == name and reason in kernel.reason


def test_an_unknown_order_of_weights_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "aten_order", lambda: None)
    kernel = select(Problem("cpu", torch.bfloat16, 256, 64, 128))
    assert kernel.name == "reference" and "unknown way" in kernel.reason


def same_bytes_as_aten() -> None:
    layer, *_ = filled(256, 192, 64, dtype=torch.bfloat16)
    q = torch.from_numpy(unpack(layer.qweight.numpy())).T.int().contiguous()
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    layer.after_load()
    assert torch.equal(layer.get_buffer("packed"), theirs)


def test_weights_are_ordered_as_aten_orders_them() -> None:
    same_bytes_as_aten()


def test_weights_are_ordered_for_other_processors_too() -> None:
    # aten chooses its kernels by this variable when it is loaded; where it knows no other choice
    # it has no effect.
    code = "import test_quant_linear as t; t.same_bytes_as_aten(); print(t.cpu.aten_order().block)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in ("32", "64")
