"""The kernel that runs everywhere: de-quantize a piece of the columns, multiply, go on.

Torch operations only, no scratch beyond one piece. It computes `(q - zero) * scale` in float32,
rounds that to the type of the activations, and multiplies in that type: exactly what a 16-bit (or
32-bit) checkpoint of the same values would do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..phase import Phase
from ..scratch import Scratch
from ..sizes import PIECE_WEIGHTS
from . import Problem
from .pieces import by_pieces, piece_columns
from .words import into_floats

JOINS: dict[str, int] = {}


def refusal(problem: Problem) -> str | None:
    """It refuses nothing."""
    return None


def prepare(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int) -> dict[str, Tensor]:
    """It computes from the stored tensors as they are."""
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}


def run(
    x: Tensor,
    held: dict[str, Tensor],
    bias: Tensor | None,
    group: int,
    phase: Phase,
    scratch: Scratch,
    step: int | None = None,
) -> Tensor:
    """x [M, K] -> [M, N], in the type of x, `step` outputs at a time. On `meta` only its memory is
    taken."""
    qweight, qzeros, scales = held["qweight"], held["qzeros"], held["scales"]
    if step is None:
        step = piece_columns(PIECE_WEIGHTS["reference"], x.shape[1], 8)
    if x.is_meta:
        return _memory_alone(x, scales.shape, step, scratch)

    def weights(columns: slice) -> Tensor:
        packed = slice(columns.start // 8, columns.stop // 8)
        inputs, outputs = len(qweight), columns.stop - columns.start
        shape = (inputs, outputs)
        nibbles, values = scratch.take(x.device, (shape, torch.int32), (shape, torch.float32))
        pieces = (qweight[:, packed], qzeros[:, packed], scales[:, columns])
        dequantize_into(nibbles, values, *pieces, group)
        if x.dtype == torch.float32:
            return values
        # The nibbles have served; their place is large enough for the rounded weights.
        rounded = nibbles.view(-1).view(x.dtype)[: values.numel()].view(shape)
        return rounded.copy_(values)

    return by_pieces(x, scales.shape[1], step, weights, bias)


def _memory_alone(x: Tensor, scales: torch.Size, step: int, scratch: Scratch) -> Tensor:
    """What computing takes: the result, the place of a piece's weights, its zero points.

    Torch describes each of the dozens of operations on pieces in Python, a hundred times slower
    than a product is described.
    """
    groups, outputs = scales
    shape = (x.shape[1], min(step, outputs))
    result = x.new_empty(x.shape[0], outputs)
    scratch.take(x.device, (shape, torch.int32), (shape, torch.float32))
    x.new_empty(groups, shape[1], dtype=torch.int32).float()
    return result


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int) -> Tensor:
    """Stored tensors -> float32 weights [K, N]."""
    values = qweight.new_empty(len(qweight), scales.shape[1], dtype=torch.float32)
    dequantize_into(
        torch.empty_like(values, dtype=torch.int32), values, qweight, qzeros, scales, group
    )
    return values


def dequantize_into(
    nibbles: Tensor, values: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int
) -> None:
    """Stored tensors, or some of their columns -> `values`, float32 [K, N]; `nibbles`, int32 of
    that shape, is overwritten."""
    grouped = values.view(-1, group, values.shape[1])
    if values.device.type == "npu":
        into_floats(qweight, values, nibbles.view(torch.float32))
        zeros = values.new_empty(scales.shape)
        into_floats(qzeros, zeros, torch.empty_like(zeros))
    else:
        unpack(qweight, nibbles)
        values.copy_(nibbles)
        zeros = unpack(qzeros).float()
    grouped.sub_(zeros.unsqueeze(1)).mul_(scales.float().unsqueeze(1))


def unpack(packed: Tensor, out: Tensor | None = None) -> Tensor:
    """int32 [R, N/8] -> int32 [R, N] of 0..15, in the order of the outputs; into `out` if given."""
    rows, words = packed.shape
    if out is None:
        out = packed.new_empty(rows, words * 8)
    # Output j of eight is nibble NIBBLE_OF[j]: even ones lie in the low half, odd in the high.
    low = torch.arange(0, 16, 4, dtype=torch.int32, device=packed.device)
    shifts = torch.stack((low, low + 16), dim=-1).flatten()
    torch.bitwise_right_shift(packed.unsqueeze(-1), shifts, out=out.view(rows, words, 8))
    return out.bitwise_and_(15)
