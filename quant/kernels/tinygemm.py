"""CUDA without own code: torch's tinygemm to decode, de-quantize and cuBLAS to prefill.

One copy of the weights serves both, in tinygemm's order, which is read back in prefill. Both
compute in bfloat16: `(q - 8) * scale + offset`, where offset is `(8 - zero) * scale`.

The order, from `matrix_to_m16n8k16_Bint4_layout` in pytorch's aten/src/ATen/native/cuda/int4mm.cu:
int32 [N / 8, K / (16 t), 32, t / 2] for t inner tiles of 16 inputs. Lane l of 32 holds output
l // 4 of eight; its word for two tiles holds inputs (l % 4) * 2 + 0, 1, 8, 9 of the one and of the
other, in the nibbles that `_NIBBLES` says.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..phase import Phase
from ..scratch import Scratch
from ..sizes import PIECE_WEIGHTS
from . import Problem
from .pieces import by_pieces, piece_columns, scales_and_offsets
from .reference import unpack

JOINS = {"packed": 0, "scales_and_offsets": 1}

CAPABILITY = (8, 0)
"""The oldest GPUs that tinygemm is compiled for (it multiplies bfloat16 tiles)."""

_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word holds its i-th input (tile by tile, ascending)."""


def refusal(problem: Problem) -> str | None:
    """Why this kernel cannot do `problem`; None if it can."""
    if problem.inputs % 32 or problem.outputs % 8:
        return f"{problem.inputs} inputs and {problem.outputs} outputs are not in tiles of 32 and 8"
    if not torch.cuda.is_available():
        return "CUDA cannot be used on this machine"
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        return "it needs compute capability 8.0, not {}.{}".format(*capability)
    if not _order_is_known(inner_tiles(problem.inputs)):
        return "this build of torch has no tinygemm, or orders its weights in an unknown way"
    return None


def inner_tiles(inputs: int) -> int:
    """Tiles of 16 inputs that lie together: the most that the inputs are a multiple of."""
    return next(tiles for tiles in (8, 4, 2) if inputs % (16 * tiles) == 0)


def prepare(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int) -> dict[str, Tensor]:
    """Stored tensors -> int32 in tinygemm's order, bfloat16 [K/g, N, 2] of scale, offset."""
    inputs, outputs = qweight.shape[0], scales.shape[1]
    tiles = inner_tiles(inputs)
    packed = qweight.new_empty(outputs // 8, inputs // (16 * tiles), 32, tiles // 2)
    step = piece_columns(PIECE_WEIGHTS["tinygemm"], inputs, 8)
    for start in range(0, outputs, step):
        words = slice(start // 8, min(start + step, outputs) // 8)
        pairs = byte_pairs(unpack(qweight[:, words].contiguous()))
        packed[words] = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
    return {"packed": packed, "scales_and_offsets": scales_and_offsets(unpack(qzeros), scales)}


def run(
    x: Tensor,
    held: dict[str, Tensor],
    bias: Tensor | None,
    group: int,
    phase: Phase,
    scratch: Scratch,
) -> Tensor:
    """x bfloat16 [M, K] -> bfloat16 [M, N]."""
    packed, pairs = held["packed"], held["scales_and_offsets"]
    if phase == "decode":
        product: Tensor = torch.ops.aten._weight_int4pack_mm(x.contiguous(), packed, group, pairs)
        return product if bias is None else product.add_(bias)

    def weights(columns: slice) -> Tensor:
        words = slice(columns.start // 8, columns.stop // 8)
        return dequantize(packed[words], pairs[:, columns], group, scratch)

    step = piece_columns(PIECE_WEIGHTS["tinygemm"], x.shape[1], 8)
    return by_pieces(x, pairs.shape[1], step, weights, bias)


def byte_pairs(q: Tensor) -> Tensor:
    """int32 [K, N] of 0..15 -> uint8 [N, K/2], as the op that packs wants it: the first of two
    inputs in the high nibble."""
    return (q[::2] << 4 | q[1::2]).to(torch.uint8).T.contiguous()


def dequantize(packed: Tensor, pairs: Tensor, group: int, scratch: Scratch) -> Tensor:
    """Some outputs of the prepared weights -> bfloat16 [K, n]."""
    eights, blocks, _, halves = packed.shape
    inputs, outputs = blocks * halves * 32, eights * 8
    words = (eights, blocks, 8, 4, halves)  # output of eight, inputs (l % 4), two tiles at a time
    nibbles, weights = scratch.take(
        packed.device, ((*words, 8), torch.int32), ((inputs, outputs), torch.bfloat16)
    )
    shifts = torch.tensor([4 * n for n in _NIBBLES], dtype=torch.int32, device=packed.device)
    torch.bitwise_right_shift(packed.view(words).unsqueeze(-1), shifts, out=nibbles)
    # The last axis is tile of two, then which half of its 16 inputs, then which of two neighbours.
    split = nibbles.bitwise_and_(15).view(eights, blocks, 8, 4, halves, 2, 2, 2)
    placed = weights.view(blocks, halves, 2, 2, 4, 2, eights, 8)
    placed.copy_(split.permute(1, 4, 5, 6, 3, 7, 0, 2))
    grouped = weights.view(inputs // group, group, outputs).sub_(8)
    scale, offset = pairs.permute(2, 0, 1).contiguous().unsqueeze(2)
    torch.addcmul(offset, grouped, scale, out=grouped)
    return grouped.view(inputs, outputs)


@cache
def _order_is_known(tiles: int) -> bool:
    """Whether what the op packs is read back: tried once on a small random matrix."""
    inputs, outputs = 16 * tiles * 2, 16
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (inputs, outputs), dtype=torch.int32, generator=generator).cuda()
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack(byte_pairs(q), tiles)
    except (AttributeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return False
    pairs = torch.ones(inputs // 32, outputs, 2, dtype=torch.bfloat16, device=q.device)
    found = dequantize(packed, pairs, 32, Scratch())
    return torch.equal(found, (q - 7).to(torch.bfloat16))
