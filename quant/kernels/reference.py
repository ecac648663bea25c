"""The kernel that runs everywhere: de-quantize a piece of the columns, multiply, go on.

Torch operations only, no scratch beyond one piece. It computes `(q - zero) * scale` in float32,
rounds that to the type of the activations, and multiplies in that type: exactly what a 16-bit (or
32-bit) checkpoint of the same values would do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..phase import Phase
from ..sizes import PIECE_WEIGHTS
from . import Problem

NAME = "reference"


def refusal(problem: Problem) -> str | None:
    """It refuses nothing."""
    return None


def prepare(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int) -> dict[str, Tensor]:
    """It computes from the stored tensors as they are."""
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}


def run(
    x: Tensor, held: dict[str, Tensor], bias: Tensor | None, group: int, phase: Phase
) -> Tensor:
    """x [M, K] -> [M, N], in the type of x."""
    qweight, qzeros, scales = held["qweight"], held["qzeros"], held["scales"]

    def weights(columns: slice) -> Tensor:
        packed = slice(columns.start // 8, columns.stop // 8)
        piece = dequantize(qweight[:, packed], qzeros[:, packed], scales[:, columns], group)
        return piece.to(x.dtype)

    return by_pieces(x, scales.shape[1], 8, weights, bias)


def by_pieces(
    x: Tensor,
    outputs: int,
    multiple: int,
    weights: Callable[[slice], Tensor],
    bias: Tensor | None,
) -> Tensor:
    """`x @ weights + bias`, with only some columns of the weights [K, N] there at a time."""
    result = x.new_empty(x.shape[0], outputs)
    step = piece_columns(x.shape[1], multiple)
    for start in range(0, outputs, step):
        columns = slice(start, min(start + step, outputs))
        if bias is None:
            result[:, columns] = x @ weights(columns)
        else:
            result[:, columns] = torch.addmm(bias[columns], x, weights(columns))
    return result


def piece_columns(inputs: int, multiple: int) -> int:
    """Outputs de-quantized at a time: a multiple of `multiple`, set by the shape alone."""
    return max(PIECE_WEIGHTS // inputs // multiple, 1) * multiple


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int) -> Tensor:
    """Stored tensors, or some of their columns -> float32 [K, N]."""
    inputs, outputs = qweight.shape[0], scales.shape[1]
    weights = unpack(qweight).float().view(inputs // group, group, outputs)
    weights.sub_(unpack(qzeros).float().unsqueeze(1)).mul_(scales.float().unsqueeze(1))
    return weights.view(inputs, outputs)


def unpack(packed: Tensor) -> Tensor:
    """int32 [R, N/8] -> int32 [R, N] of 0..15, in the order of the outputs."""
    # Output j of eight is nibble NIBBLE_OF[j]: even ones lie in the low half, odd in the high.
    low = torch.arange(0, 16, 4, dtype=torch.int32, device=packed.device)
    shifts = torch.stack((low, low + 16), dim=-1).flatten()
    nibbles = packed.unsqueeze(-1) >> shifts
    return nibbles.bitwise_and_(15).flatten(1)
