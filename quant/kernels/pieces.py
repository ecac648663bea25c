"""Multiplying by weights of which only some columns are de-quantized at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_pieces(
    x: Tensor,
    outputs: int,
    step: int,
    weights: Callable[[slice], Tensor],
    bias: Tensor | None,
) -> Tensor:
    """`x @ weights + bias`, where `weights(columns)` makes `step` columns of [K, N] at a time."""
    result = x.new_empty(x.shape[0], outputs)
    for start in range(0, outputs, step):
        columns = slice(start, min(start + step, outputs))
        if bias is None:
            torch.mm(x, weights(columns), out=result[:, columns])
        else:
            torch.addmm(bias[columns], x, weights(columns), out=result[:, columns])
    return result


def piece_columns(piece_weights: int, inputs: int, multiple: int) -> int:
    """Outputs de-quantized at a time: a multiple of `multiple`, set by the shape alone."""
    return max(piece_weights // inputs // multiple, 1) * multiple


def scales_and_offsets(zeros: Tensor, scales: Tensor) -> Tensor:
    """Zero points and scales [K/g, N] -> bfloat16 [K/g, N, 2] of scale and `(8 - zero) * scale`,
    for kernels that compute `(q - 8) * scale + offset`."""
    step = scales.float()
    return torch.stack((step, (8 - zeros).float() * step), dim=-1).to(torch.bfloat16)
