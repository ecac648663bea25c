"""8-bit weights with a scale for every output: a product of few rows, or 16 bits piece by piece."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ..phase import Phase
from ..scratch import Scratch
from ..sizes import EIGHT_BIT_PIECE
from . import Problem, native, triton
from .pieces import by_pieces, piece_columns

ROWS = 8
"""Rows up to which the weights are multiplied as they are."""

INPUTS = 32
"""Of which inputs are a multiple where the CPU multiplies them as they are."""

Product = Literal["native", "aten", "triton", "pieces"]
"""What multiplies a few rows: the compiled kernel or aten's on the CPU, Triton's on CUDA, or
weights that become 16- or 32-bit piece by piece."""


def product_of(device: str, dtype: torch.dtype, inputs: int, outputs: int) -> Product:
    """The product there is on a type of device for activations of `dtype`."""
    if device == "cuda":
        return "triton" if triton.unusable(dtype) is None else "pieces"
    if device != "cpu" or dtype != torch.bfloat16 or inputs % INPUTS:
        return "pieces"
    if native.refusal(Problem(device, dtype, inputs, outputs, INPUTS)) is None:
        return "native"
    return "aten" if _aten_multiplies() else "pieces"


@cache
def _aten_multiplies() -> bool:
    """Whether this build of torch has a product of bytes, and a right one; tried once."""
    x = torch.ones(1, INPUTS, dtype=torch.bfloat16, device="cpu")
    weights = torch.full((16, INPUTS), 2, dtype=torch.int8, device="cpu")
    scales = torch.full((16,), 0.5, dtype=torch.bfloat16, device="cpu")
    try:
        found: Tensor = torch.ops.aten._weight_int8pack_mm(x, weights, scales)
    except (AttributeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return False
    return bool((found == INPUTS).all())


def multiply(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    phase: Phase,
    scratch: Scratch,
    product: Product,
) -> Tensor:
    """x [M, K] times int8 [N, K], row by row times 16-bit [N] -> [M, N] of the type of `x`, within
    `eight_bit_scratch_bytes`; by `product`, which `product_of` found. In prefill and for more rows
    weights are converted piece by piece."""
    if phase == "decode" and len(x) <= ROWS:
        if product == "native":
            return _with(bias, native.product_of_bytes(x, weights, scales))
        if product == "aten":
            rows = x.contiguous()
            return _with(bias, torch.ops.aten._weight_int8pack_mm(rows, weights, scales))
        if product == "triton":
            from ..triton import products

            return products.product_of_bytes(x, weights, scales, bias, scratch)
    outputs, inputs = weights.shape

    def piece(columns: slice) -> Tensor:
        shape = (columns.stop - columns.start, inputs)
        (out,) = scratch.take(x.device, (shape, x.dtype))
        # One rounding: 16-bit numbers are multiplied in fp32. Of two types, copies would be made.
        out.copy_(weights[columns]).mul_(scales[columns].to(x.dtype).unsqueeze(1))
        return out.T

    return by_pieces(x, outputs, piece_columns(EIGHT_BIT_PIECE, inputs, 64), piece, bias)


def _with(bias: Tensor | None, product: Tensor) -> Tensor:
    return product if bias is None else product.add_(bias)
