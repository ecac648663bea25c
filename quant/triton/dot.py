"""Up to 64 rows times 4-bit weights, on tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "groups", "groups_each"])
def four_bits_by_tiles(
    x: tl.tensor,
    qweight: tl.tensor,
    qzeros: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    inputs: tl.tensor,
    words: tl.tensor,
    groups: tl.tensor,
    groups_each: tl.tensor,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    INPUTS: tl.constexpr,
    WORDS: tl.constexpr,
    DIRECT: tl.constexpr,
) -> None:
    """As `gemv.four_bits`. What is multiplied is `q - zero`, which is exact in 16 bits; the sum of
    a group in fp32 is then scaled, so that no weight is rounded and none overflows."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = word < words
    eight = tl.arange(0, 8)
    shift = (eight % 2) * 16 + (eight // 2) * 4
    column = tl.program_id(0) * WORDS * 8 + tl.arange(0, WORDS * 8)
    kept = column < words * 8
    row = tl.arange(0, ROWS)
    wanted = row < count
    lanes = tl.arange(0, INPUTS)
    first = tl.program_id(1) * groups_each
    last = tl.minimum(first + groups_each, groups)
    total = tl.zeros([ROWS, WORDS * 8], tl.float32)
    for group in range(first, last):
        zero = tl.load(qzeros + group * words + word, mask=inside, other=0)
        zeros = (zero[:, None] >> shift[None, :]) & 15
        scale = tl.load(scales + group * words * 8 + column, mask=kept, other=0).to(tl.float32)
        sums = tl.zeros([ROWS, WORDS * 8], tl.float32)
        for start in tl.static_range(0, GROUP, INPUTS):
            place = group * GROUP + start + lanes
            packed = tl.load(
                qweight + place[:, None] * words + word[None, :],
                mask=inside[None, :],
                other=0,
                eviction_policy="evict_first",
            )
            exact = ((packed[:, :, None] >> shift[None, None, :]) & 15) - zeros[None, :, :]
            weights = tl.reshape(exact, [INPUTS, WORDS * 8]).to(tl.float32).to(x.dtype.element_ty)
            values = tl.load(
                x + row[:, None] * inputs + place[None, :], mask=wanted[:, None], other=0
            )
            sums = tl.dot(values, weights, sums)
        total += sums * scale[None, :]
    if DIRECT:
        if bias is not None:
            total += tl.load(bias + column, mask=kept, other=0).to(tl.float32)[None, :]
        target = out + row[:, None] * words * 8 + column[None, :]
    else:
        line = tl.program_id(1) * count + row
        target = out + line[:, None] * words * 8 + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=wanted[:, None] & kept[None, :])
