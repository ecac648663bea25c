"""Ascend's 4-bit product on weights as the file has them: layers that stream run as they arrive.

A word of the file holds unsigned integers, and its eight outputs in an order of its own. Turning
the highest bit of every nibble makes them signed; the order stays, scales, offsets and bias follow
it, and outputs are put in order when they are written. So every number is that of a layer which
stays, and nothing is de-quantized.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..phase import Phase
from ..scratch import Scratch
from ..sizes import PIECE_WEIGHTS
from . import Problem, ascend
from .pieces import piece_columns
from .words import as_stored

_PIECE_WEIGHTS = 1 << 24
"""Weights turned at a time: half as many bytes, a quarter of what the reference takes."""


def refusal(problem: Problem) -> str | None:
    """Why this kernel cannot do `problem`; None if it can. Tries the shapes of its pieces."""
    step = _step(problem.inputs, problem.outputs)
    for outputs in {step, problem.outputs % step or step}:
        piece = Problem(problem.device, problem.dtype, problem.inputs, outputs, problem.group)
        refused = ascend.refusal(piece)
        if refused is not None:
            return refused
    return None


def run(
    x: Tensor,
    held: dict[str, Tensor],
    bias: Tensor | None,
    group: int,
    phase: Phase,
    scratch: Scratch,
) -> Tensor:
    """x [M, K] -> [M, N], in the type of x; `held` is what the file has."""
    qweight, qzeros, scales = held["qweight"], held["qzeros"], held["scales"]
    inputs, outputs = x.shape[1], scales.shape[1]
    rows, result = x.contiguous(), x.new_empty(len(x), outputs)
    step = _step(inputs, outputs)
    for start in range(0, outputs, step):
        columns = slice(start, min(start + step, outputs))
        words = slice(columns.start // 8, columns.stop // 8)
        width = columns.stop - columns.start
        (turned,) = scratch.take(x.device, ((inputs, width // 8), torch.int32))
        torch.bitwise_xor(qweight[:, words], ascend.SIGNS, out=turned)
        steps = _in_stored_order(ascend.in_type(scales[:, columns], x.dtype))
        pairs = torch.stack((steps, (8 - as_stored(qzeros[:, words])).to(x.dtype)))
        added = None if bias is None else _in_stored_order(bias[columns])
        # Results of as many rows at a time as there is room for beside the weights.
        count = max(min(PIECE_WEIGHTS["ascend"] // width, inputs), 1)
        for first in range(0, len(x), count):
            some = slice(first, first + count)
            out = ascend.product(rows[some], turned, pairs, added, group)
            placed = result[some, columns].unflatten(1, (-1, 4, 2))
            placed.copy_(out.unflatten(1, (-1, 2, 4)).transpose(2, 3))
    return result


def _step(inputs: int, outputs: int) -> int:
    """Outputs of one product."""
    most = min(piece_columns(_PIECE_WEIGHTS, inputs, 8), ascend.MOST // 8 * 8)
    return min(most, outputs)


def _in_stored_order(values: Tensor) -> Tensor:
    """[..., N] in the order of outputs -> the same in that of the file's nibbles: of eight, the
    even ones, then the odd ones."""
    return values.unflatten(-1, (-1, 4, 2)).transpose(-1, -2).flatten(-3)
