"""What a type of device holds on the way to its results, besides what every device holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowvram.engine.spans import LONGEST

QUERY_BLOCK, KEY_BLOCK, LONGEST_KEY_BLOCK = 256, 512, 8192
"""Rows and keys of the block-wise attention, as in `models/attention.py`."""

CAUSAL_ROWS = 64
"""Rows of a block of the CPU's causal attention, as there."""

FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """How a device computes what is not a product.

    `wide_norms`: norms go through fp32, else they stay in the type of the activations.
    `attention`: `fused` holds its output alone; `grouped` a copy of it and a sum for each row;
    `halves` two results that are joined in fp32; `blocks` a block of scores.
    `sampling`: bytes a logit that drawing takes, at most; `waiting`: fp32 logits of earlier steps
    that are still there, and that the device's own statistics count.
    `joins`: packed linears of one input may give one result, whose halves go together.
    """

    wide_norms: bool
    attention: Literal["fused", "grouped", "halves", "blocks"]
    sampling: int
    waiting: int = 0
    joins: bool = True

    def norm_bytes(self, width: int, itemsize: int) -> int:
        """One row of `width` on its way through a norm."""
        return 2 * width * (FLOAT if self.wide_norms else itemsize)

    def attention_bytes(
        self, rows: int, keys: int, heads: int, kv_heads: int, dim: int, itemsize: int
    ) -> int:
        """`rows` queries of `heads` heads over `keys` keys: the output, and what is held for it."""
        values = rows * heads * dim
        out = values * itemsize
        if self.attention == "fused":
            return out
        if self.attention == "grouped":
            # A single row may read its whole span of keys, with its scores and their softmax.
            row = heads * LONGEST * (2 * FLOAT + itemsize) if rows == 1 and keys <= LONGEST else 0
            return 2 * out + rows * heads * FLOAT + row
        if self.attention == "halves":
            # The last block of the triangle, with its mask, is there while the halves are joined.
            block = min(rows, CAUSAL_ROWS)
            triangle = 2 * block * heads * dim + (1 + heads // kv_heads) * block * rows
            return 2 * out + triangle * itemsize + 3 * values * FLOAT + 6 * rows * heads * FLOAT
        block = min(rows, QUERY_BLOCK)
        span = min(keys, QUERY_BLOCK * KEY_BLOCK // max(block, 1), LONGEST_KEY_BLOCK)
        scores = 2 * heads * block * span * FLOAT + block * span
        queries = 4 * heads * block * (dim + 1) * FLOAT
        return out + scores + queries + kv_heads * span * dim * FLOAT


_ACCELERATOR = Kernels(wide_norms=True, attention="grouped", sampling=8, waiting=2)

_KERNELS = {
    "meta": Kernels(wide_norms=False, attention="fused", sampling=0, joins=False),
    "cpu": Kernels(wide_norms=True, attention="halves", sampling=34),
    "cuda": _ACCELERATOR,
    "npu": Kernels(wide_norms=True, attention="blocks", sampling=8, waiting=2, joins=False),
}


def kernels_of(device_type: str) -> Kernels:
    """Those of `cuda`, `npu`, `cpu` or `meta`."""
    return _KERNELS[device_type]
