"""Packed linears on a CUDA device against `(q - z) * s` in float32, by every kernel there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowvram.quant import (
    Problem,
    QuantLinear,
    RoundedHead,
    Scratch,
    apply_all,
    apply_gated,
    join,
    kernel_phase,
    quantize,
    scratch_bytes,
    select,
)
from lowvram.quant.kernels.reference import dequantize, unpack

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SHAPES = [(128, 64), (256, 1536), (3584, 512), (18944, 128)]
"""Inputs in one, two, four and eight tiles of 16, as the 7B has them too."""
BFLOAT16 = 1 / 128
"""Two roundings to 8 bits: of a weight, and of the result."""
BOUND = {torch.bfloat16: BFLOAT16, torch.float16: 1 / 1024}


def linear(
    inputs: int, outputs: int, group: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> tuple[QuantLinear, Tensor, Tensor]:
    """A packed linear, and the weights [outputs, inputs] and bias that it stands for."""
    rng = np.random.default_rng(seed)
    made = quantize(rng.standard_normal((outputs, inputs)).astype(np.float32), group)
    layer = QuantLinear(inputs, outputs, True, group, dtype=dtype, scales_dtype=torch.float16)
    parts = [torch.from_numpy(value) for value in made]
    for name, value in zip(("qweight", "qzeros", "scales"), parts, strict=True):
        layer.get_buffer(name).copy_(value)
    bias = layer.get_buffer("bias").copy_(torch.from_numpy(rng.standard_normal(outputs)))
    q, zeros = unpack(parts[0]), unpack(parts[1])
    zero, scale = (t.float().repeat_interleave(group, 0) for t in (zeros, parts[2]))
    return layer.to(CUDA), ((q.float() - zero) * scale).T, bias.float()


def check(found: Tensor, x: Tensor, weights: Tensor, bias: Tensor) -> None:
    wanted = x.float().cpu() @ weights.T + bias
    error = (found.float().cpu() - wanted).norm() / wanted.norm()
    assert error < BOUND[found.dtype]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tinygemm_multiplies_what_is_stored(
    shape: tuple[int, int], group: int, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWVRAM_TRITON", "0")
    layer, weights, bias = linear(*shape, group)
    layer.after_load()
    assert layer.kernel.name == "tinygemm"
    x = torch.randn(1 if phase == "decode" else 37, shape[0], device=CUDA).bfloat16()
    with kernel_phase(phase):  # type: ignore[arg-type]
        check(layer(x), x, weights, bias)


def test_streamed_weights_are_multiplied_as_they_lie_in_the_file() -> None:
    """Without `after_load`, by the kernel that multiplies what stays, in both types."""
    for dtype in BOUND:
        layer, weights, bias = linear(256, 192, 64, dtype=dtype)
        x = torch.randn(3, 256, device=CUDA).to(dtype)
        for phase in ("prefill", "decode"):
            with kernel_phase(phase):  # type: ignore[arg-type]
                check(layer(x), x, weights, bias)
        assert layer.kernel.name == "triton"


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3584, 37888), (2048, 2560)], ids=str)
def test_triton_multiplies_what_is_stored(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_triton(shape, 128, dtype, (1, 2, 4, 8, 9, 33, 64, 65))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("group", [32, 64])
def test_triton_multiplies_smaller_groups(group: int, dtype: torch.dtype) -> None:
    """Fewer rows, for every tile is compiled anew for each size of group."""
    check_triton((256, 1536), group, dtype, (1, 9, 65))


def check_triton(
    shape: tuple[int, int], group: int, dtype: torch.dtype, counts: tuple[int, ...]
) -> None:
    layer, weights, bias = linear(*shape, group, dtype=dtype)
    layer.after_load()
    assert layer.kernel.name == "triton"
    for rows in counts:
        x = torch.randn(rows, shape[0], device=CUDA).to(dtype)
        with kernel_phase("decode"):
            found = layer(x)
            check(found, x, weights, bias)
            assert torch.equal(layer(x), found)  # the same every time
        check(layer(x), x, weights, bias)
    assert layer.scratch.nbytes <= scratch_bytes(*shape, "triton", group)


def test_triton_agrees_with_the_reference_and_keeps_what_is_loaded() -> None:
    layer, _, _ = linear(256, 192, 64)
    stored = {name: layer.get_buffer(name) for name in ("qweight", "qzeros", "scales")}
    layer.after_load()
    for name, tensor in stored.items():
        assert layer.get_buffer(name) is tensor
    exact = select(Problem("cuda", torch.bfloat16, 256, 192, 64), "reference")
    x = torch.randn(5, 256, device=CUDA).bfloat16()
    wanted = exact.run(x, stored, layer.bias, 64, "prefill", Scratch())
    torch.testing.assert_close(layer(x), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 20, 65])
def test_gated_products_are_those_of_single_operations(rows: int, dtype: torch.dtype) -> None:
    pair = [linear(256, 128, 64, seed, dtype)[0] for seed in (0, 1)]
    apart = [linear(256, 128, 64, seed, dtype)[0] for seed in (0, 1)]
    join(pair)
    assert pair[0].joined == (128, 128)
    x = torch.randn(rows, 256, device=CUDA).to(dtype)
    with kernel_phase("decode"):
        found, wanted = apply_gated(*pair, x), apply_gated(*apart, x)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


def test_what_float16_cannot_hold_is_infinite_and_never_no_number() -> None:
    layer, _, _ = linear(256, 64, 64, dtype=torch.float16)
    layer.get_buffer("scales").fill_(65504.0)
    x = torch.full((9, 256), 60000.0, device=CUDA).half()
    with kernel_phase("decode"):
        for rows in (1, 9):
            assert not layer(x[:rows]).isnan().any()
            assert layer(x[:rows]).isinf().any()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_a_head_of_8_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, and piece by piece where there is none."""
    weight = torch.randn(9000, 1024).to(dtype)
    with torch.device("meta"):
        head = RoundedHead(1024, 9000, 8)
    head.fill_from(lambda start, stop: weight[start:stop], CUDA)
    assert head.rounded
    x = torch.randn(1, 1024, device=CUDA).to(dtype)
    wanted = x.float().cpu() @ weight.float().T
    assert head.product == "triton"
    for product in ("triton", "pieces"):
        monkeypatch.setattr(head, "product", product)
        found = head(x)
        assert found.dtype == dtype
        assert (found.float().cpu() - wanted).norm() / wanted.norm() < 0.012


def test_joined_linears_compute_what_they_did_apart() -> None:
    made = [linear(256, outputs, 128, outputs) for outputs in (256, 64, 64)]
    layers = [layer for layer, _, _ in made]
    join(layers)
    for layer in layers:
        layer.after_load()
    x = torch.randn(5, 256, device=CUDA).bfloat16()
    for phase in ("prefill", "decode"):
        with kernel_phase(phase):  # type: ignore[arg-type]
            for (_, weights, bias), found in zip(made, apply_all(layers, x), strict=True):
                check(found, x, weights, bias)


def test_the_reference_on_the_device_is_that_of_the_cpu() -> None:
    layer, _, _ = linear(256, 192, 64)
    stored = [layer.get_buffer(name) for name in ("qweight", "qzeros", "scales")]
    assert torch.equal(dequantize(*stored, 64).cpu(), dequantize(*(t.cpu() for t in stored), 64))
