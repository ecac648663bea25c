"""8-bit weights with a scale for every output, where the CPU's own products do not apply."""

from __future__ import annotations

from torch import Tensor

from ..phase import Phase
from ..scratch import Scratch
from ..sizes import EIGHT_BIT_PIECE
from . import triton
from .pieces import by_pieces, piece_columns

ROWS = 8
"""Rows up to which the weights are multiplied as they are."""


def multiply(
    x: Tensor, weights: Tensor, scales: Tensor, bias: Tensor | None, phase: Phase, scratch: Scratch
) -> Tensor:
    """x 16-bit [M, K] times int8 [N, K], row by row times 16-bit [N] -> [M, N], within
    `eight_bit_scratch_bytes`. In prefill, for more rows and where Triton's kernels cannot be used,
    weights become 16-bit piece by piece."""
    if phase == "decode" and len(x) <= ROWS and triton.unusable(x.dtype) is None:
        from ..triton import products

        return products.product_of_bytes(x, weights, scales, bias, scratch)
    outputs, inputs = weights.shape

    def piece(columns: slice) -> Tensor:
        shape = (columns.stop - columns.start, inputs)
        (out,) = scratch.take(x.device, (shape, x.dtype))
        # One rounding: the product of the 16-bit integers and the scale is made in fp32.
        out.copy_(weights[columns]).mul_(scales[columns].float().unsqueeze(1))
        return out.T

    return by_pieces(x, outputs, piece_columns(EIGHT_BIT_PIECE, inputs, 64), piece, bias)
