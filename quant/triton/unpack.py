"""4-bit weights to 16 bits, for cuBLAS."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_16_bits(
    qweight: tl.tensor,
    qzeros: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    words: tl.tensor,
    GROUP: tl.constexpr,
    INPUTS: tl.constexpr,
    WORDS: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """Words `first` to `first + width` of every row: `(q - zero) * scale` in fp32, rounded once,
    to `out` [K, 8 * width]. What 16 bits cannot hold becomes the largest that they can: infinity
    times an input of zero would be no number."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = word < width
    eight = tl.arange(0, 8)
    shift = (eight % 2) * 16 + (eight // 2) * 4
    column = word[:, None] * 8 + eight[None, :]
    start = tl.program_id(1) * INPUTS
    place = start + tl.arange(0, INPUTS)
    group = start // GROUP
    zero = tl.load(qzeros + group * words + first + word, mask=inside, other=0)
    zeros = (zero[:, None] >> shift[None, :]) & 15
    line = scales + (group * words + first) * 8
    scale = tl.load(line + column, mask=inside[:, None], other=0).to(tl.float32)
    packed = tl.load(
        qweight + place[:, None] * words + first + word[None, :], mask=inside[None, :], other=0
    )
    exact = ((packed[:, :, None] >> shift[None, None, :]) & 15) - zeros[None, :, :]
    value = exact.to(tl.float32) * scale[None, :, :]
    value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
    target = out + place[:, None, None] * width * 8 + column[None, :, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=inside[None, :, None])
