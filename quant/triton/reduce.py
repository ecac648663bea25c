"""The second stage of a product of which several programs computed a part of the inputs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "splits"])
def add_parts(
    parts: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    outputs: tl.tensor,
    splits: tl.tensor,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """fp32 [splits, count, N] -> [count, N], always in the same order, so that the same numbers
    come out every time. GATED: `silu` of the first half times the second, [count, N / 2], rounded
    where the operations one by one would be; what the type of `out` cannot hold is the LARGEST that
    it can, before the two meet: infinity times zero would be no number."""
    row = tl.program_id(1)
    width = outputs // 2 if GATED else outputs
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.zeros([BLOCK], tl.float32)
    other = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        line = parts + (split * count + row) * outputs + column
        value += tl.load(line, mask=inside, other=0)
        if GATED:
            other += tl.load(line + width, mask=inside, other=0)
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
        if GATED:
            other += tl.load(bias + width + column, mask=inside, other=0).to(tl.float32)
    kind: tl.constexpr = out.dtype.element_ty
    if GATED:
        value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST).to(kind).to(tl.float32)
        other = tl.minimum(tl.maximum(other, -LARGEST), LARGEST).to(kind).to(tl.float32)
        value = (value / (1 + tl.exp(-value))).to(kind).to(tl.float32) * other
    tl.store(out + row * width + column, value.to(kind), mask=inside)
