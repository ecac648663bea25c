"""Packed linears on a CUDA device against `(q - z) * s` in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowvram.quant import QuantLinear, apply_all, join, kernel_phase, quantize
from lowvram.quant.kernels.reference import dequantize, unpack

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SHAPES = [(128, 64), (256, 1536), (3584, 512), (18944, 128)]
"""Inputs in one, two, four and eight tiles of 16, as the 7B has them too."""
BFLOAT16 = 1 / 128
"""Two roundings to 8 bits: of a weight, and of the result."""


def linear(
    inputs: int, outputs: int, group: int, seed: int = 0
) -> tuple[QuantLinear, Tensor, Tensor]:
    """A packed linear, and the weights [outputs, inputs] and bias that it stands for."""
    rng = np.random.default_rng(seed)
    made = quantize(rng.standard_normal((outputs, inputs)).astype(np.float32), group)
    layer = QuantLinear(
        inputs, outputs, True, group, dtype=torch.bfloat16, scales_dtype=torch.float16
    )
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
    assert error < BFLOAT16


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tinygemm_multiplies_what_is_stored(shape: tuple[int, int], group: int, phase: str) -> None:
    layer, weights, bias = linear(*shape, group)
    layer.after_load()
    assert layer.kernel.name == "tinygemm"
    x = torch.randn(1 if phase == "decode" else 37, shape[0], device=CUDA).bfloat16()
    with kernel_phase(phase):  # type: ignore[arg-type]
        check(layer(x), x, weights, bias)


def test_streamed_weights_are_multiplied_as_they_lie_in_the_file() -> None:
    """Without `after_load`, by the reference kernel on the device."""
    layer, weights, bias = linear(256, 192, 64)
    x = torch.randn(3, 256, device=CUDA).bfloat16()
    check(layer(x), x, weights, bias)


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
