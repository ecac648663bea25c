"""The fast kernel for CPUs: aten's 4-bit product for decoding, block-wise de-quantize for prefill.

One copy of the weights serves both. aten orders them by what the processor can do, so the order is
found out once, by packing a known matrix, and read back in prefill. Both compute in bfloat16:
`(q - 8) * scale + offset`, where offset is `(8 - zero) * scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..phase import Phase
from ..scratch import Scratch
from ..sizes import PIECE_WEIGHTS
from . import Problem
from .pieces import by_pieces, piece_columns, scales_and_offsets
from .reference import unpack
from .words import in_order

JOINS = {"packed": 0, "scales_and_offsets": 1}

_PROBE_ROWS, _PROBE_INPUTS = 128, 16


@dataclass(frozen=True)
class Order:
    """How aten lays 4-bit weights out: [N / block][K][block / 2] bytes.

    The low nibbles of a row of bytes hold the outputs `low` of their block, the high ones `high`.
    """

    block: int
    low: slice
    high: slice


def refusal(problem: Problem) -> str | None:
    """Why this kernel cannot do `problem`; None if it can."""
    order = aten_order()
    if order is None:
        return "this build of torch has no 4-bit product, or orders its weights in an unknown way"
    if problem.outputs % order.block:
        return f"{problem.outputs} outputs are no multiple of {order.block}"
    return None


def prepare(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int) -> dict[str, Tensor]:
    """Stored tensors -> uint8 [N, K/2] in aten's order, bfloat16 [K/g, N, 2] of scale, offset."""
    inputs, outputs = qweight.shape[0], scales.shape[1]
    packed = qweight.new_empty(outputs, inputs // 2, dtype=torch.uint8)
    step = piece_columns(PIECE_WEIGHTS["cpu"], inputs, _order().block)
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        packed[start:stop] = _repack(qweight[:, start // 8 : stop // 8])
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
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, group, pairs)
        return product if bias is None else product.add_(bias)

    def weights(columns: slice) -> Tensor:
        return _dequantize(packed[columns], pairs[:, columns], group, scratch)

    step = piece_columns(PIECE_WEIGHTS["cpu"], x.shape[1], _order().block)
    return by_pieces(x, packed.shape[0], step, weights, bias)


@cache
def aten_order() -> Order | None:
    """The order on this machine, found by packing a matrix that numbers its places."""
    places = torch.arange(_PROBE_ROWS * _PROBE_INPUTS, device="cpu")
    places = places.view(_PROBE_ROWS, _PROBE_INPUTS)
    low, high = torch.zeros(2, places.numel() // 2, dtype=torch.int64, device="cpu")
    for digit in range(3):  # 16 to the third numbers more places than there are
        nibbles = (places >> (4 * digit) & 15).to(torch.int32)
        try:
            found = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
        except (AttributeError, RuntimeError):  # NotImplementedError is a RuntimeError
            return None
        found = found.flatten().long()
        low += (found & 15) << (4 * digit)
        high += (found >> 4) << (4 * digit)
    half = int((low % _PROBE_INPUTS == 0).long().cumprod(0).sum())
    for order in _known_orders(half):
        if _places_of(places, order) == (low.tolist(), high.tolist()):
            return order
    return None


def _known_orders(half: int) -> tuple[Order, Order]:
    """Halves of a block side by side (AVX-512, AVX2), or its outputs taken in turn (others)."""
    return (
        Order(2 * half, slice(0, half), slice(half, 2 * half)),
        Order(2 * half, slice(0, 2 * half, 2), slice(1, 2 * half, 2)),
    )


def _places_of(places: Tensor, order: Order) -> tuple[list[int], list[int]]:
    """The numbers of a matrix [N, K] as `order` would have low and high nibbles follow."""
    if not order.block or places.shape[0] % order.block:
        return [], []
    blocks = places.view(-1, order.block, places.shape[1])
    low, high = (blocks[:, half].transpose(1, 2).flatten() for half in (order.low, order.high))
    return low.tolist(), high.tolist()


def _order() -> Order:
    order = aten_order()
    assert order is not None  # or the kernel would have refused
    return order


def _repack(qweight: Tensor) -> Tensor:
    """int32 [K, n/8] as stored -> uint8 [n, K/2] in aten's order."""
    order, inputs = _order(), qweight.shape[0]
    pairs = in_order(qweight.contiguous()).view(torch.uint8)
    outputs = pairs.new_empty(inputs, pairs.shape[1], 2)
    outputs[..., 0], outputs[..., 1] = pairs & 15, pairs >> 4
    blocks = outputs.view(inputs, -1, order.block)
    # Nibbles do not overlap, so a sum joins them; unlike shift and or it is vectorized.
    joined = torch.add(blocks[..., order.low], blocks[..., order.high], alpha=16)
    return joined.transpose(0, 1).reshape(-1, inputs // 2)


def _dequantize(packed: Tensor, pairs: Tensor, group: int, scratch: Scratch) -> Tensor:
    """Some outputs of the prepared weights -> bfloat16 [K, n]."""
    order, outputs, inputs = _order(), packed.shape[0], packed.shape[1] * 2
    blocks, half = outputs // order.block, order.block // 2
    weights, nibbles = scratch.take(
        packed.device,
        ((inputs, blocks, order.block), torch.bfloat16),
        ((blocks, inputs, half), torch.uint8),
    )
    pieces = packed.view(blocks, inputs, half)
    for place in (order.low, order.high):
        # A nibble with its top bit turned, shifted right as a signed byte, is already `q - 8`.
        signed = torch.bitwise_xor(pieces, 0x88, out=nibbles).view(torch.int8)
        if place == order.low:
            signed.mul_(16)
        # Turned only when copied: taking nibbles out is several times faster where they lie.
        weights[..., place] = signed.bitwise_right_shift_(4).transpose(0, 1)
    grouped = weights.view(inputs // group, group, outputs)
    # Neighbours in memory, or the product is not vectorized.
    scale, offset = pairs.permute(2, 0, 1).contiguous().unsqueeze(2)
    torch.addcmul(offset, grouped, scale, out=grouped)
    return grouped.view(inputs, outputs)
