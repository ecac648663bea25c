"""Linears rounded to 8 bits while they are read: how far off, what they take, what they become."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from allocations import Allocations
from torch import nn

from lowvram.quant import (
    RoundedLinear,
    Scratch,
    apply_all,
    apply_gated,
    eight_bit_scratch_bytes,
    join,
    kernel_phase,
    rounded_bytes,
    rounding_bytes,
)
from lowvram.quant.kernels import eight_bits
from lowvram.quant.sizes import ROUNDED_AT_ONCE

CPU = torch.device("cpu")
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def rows_of(weight: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda start, stop: weight[start:stop].clone()


def filled(weight: torch.Tensor, bias: torch.Tensor | None = None) -> RoundedLinear:
    outputs, inputs = weight.shape
    with torch.device("meta"):
        linear = RoundedLinear(inputs, outputs, bias is not None)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    linear.fill_from(rows_of(weight), CPU)
    return linear


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("switch", ["1", "0"])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_every_product_is_as_near_as_8_bits_allow(
    switch: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWVRAM_NATIVE", switch)
    torch.manual_seed(0)
    for outputs, inputs in ((96, 160), (7, 33)):
        weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
        weight[3] = 0.0
        weight[5] *= 1e-3
        linear = filled(weight, bias)
        assert linear.rounded and (linear.product == "pieces") == (dtype != BRAIN or inputs == 33)
        for tokens in (1, 3, 40):
            x = torch.randn(2, tokens, inputs).to(dtype)
            exact = x.float() @ weight.float().T + bias.float()
            for phase in ("decode", "prefill"):
                with kernel_phase(phase):  # type: ignore[arg-type]
                    found = linear(x)
                assert found.shape == exact.shape and found.dtype == dtype
                assert 0 < off(found, exact) < 0.012
                assert off(found[..., 5], exact[..., 5]) < 0.02


def test_it_is_read_in_pieces_and_takes_no_more_than_planned() -> None:
    inputs, asked = 2048, []
    outputs = 2 * ROUNDED_AT_ONCE // inputs + 32
    weight = torch.randn(outputs, inputs).bfloat16()

    def rows(start: int, stop: int) -> torch.Tensor:
        asked.append(stop - start)
        return weight[start:stop].clone()

    with torch.device("meta"):
        linear = RoundedLinear(inputs, outputs, False)
    with Allocations() as seen:
        linear.fill_from(rows, CPU)
    assert max(asked) * inputs == ROUNDED_AT_ONCE < weight.numel()
    held = rounded_bytes(inputs, outputs)
    assert sum(one.nbytes for one in linear.buffers()) == held
    assert held < sum(seen.sizes) <= held + len(asked) * rounding_bytes(inputs, outputs)


def test_pieces_become_wide_within_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bits, "EIGHT_BIT_PIECE", 64 * 96)
    weight = torch.randn(300, 96)
    linear = filled(weight)
    linear.scratch = scratch = Scratch()
    x = torch.randn(5, 96)
    assert off(linear(x), x @ weight.T) < 0.012
    assert 0 < scratch.nbytes <= 4 * 64 * 96 < eight_bit_scratch_bytes(96, 300, 4)


def test_a_missing_product_of_aten_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWVRAM_NATIVE", "0")
    assert eight_bits.product_of("cpu", BRAIN, 64, 64) == "aten"
    monkeypatch.setattr(eight_bits, "_aten_multiplies", lambda: False)
    assert eight_bits.product_of("cpu", BRAIN, 64, 64) == "pieces"
    for device in ("npu", "meta"):
        assert eight_bits.product_of(device, BRAIN, 64, 64) == "pieces"


@pytest.mark.parametrize("dtype", [BRAIN, FULL])
def test_those_of_one_input_are_one(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weights = [torch.randn(outputs, 64).to(dtype) for outputs in (96, 32, 32)]
    biases = [torch.randn(len(weight)).to(dtype) for weight in weights]
    alone = [filled(*both) for both in zip(weights, biases, strict=True)]
    linears = [filled(*both) for both in zip(weights, biases, strict=True)]
    join(linears)
    assert bool(linears[0].joined) == (dtype == BRAIN)
    assert sum(len([*one.buffers()]) for one in linears) == (2 if linears[0].joined else 6)
    x = torch.randn(1, 1, 64).to(dtype)
    for phase in ("decode", "prefill"):
        with kernel_phase(phase):  # type: ignore[arg-type]
            for found, one in zip(apply_all(linears, x), alone, strict=True):
                torch.testing.assert_close(found, one(x), rtol=1e-2, atol=1e-2)
    gate, up = filled(weights[1]), filled(weights[2])
    wanted = torch.nn.functional.silu(gate(x)) * up(x)
    join((gate, up))
    torch.testing.assert_close(apply_gated(gate, up, x), wanted, rtol=2e-2, atol=2e-2)


def test_on_meta_it_counts() -> None:
    with torch.device("meta"):
        linear = RoundedLinear(64, 96, True).requires_grad_(False)
        linear.fill_from(lambda start, stop: torch.empty(stop - start, 64), torch.device("meta"))
    assert linear(torch.empty(2, 5, 64, device="meta")).shape == (2, 5, 96)
    assert sum(one.nbytes for one in linear.buffers()) == rounded_bytes(64, 96)
