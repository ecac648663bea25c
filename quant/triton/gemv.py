"""Up to eight rows times 4-bit weights, as they lie in an AWQ file."""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import nibble, quarter


@triton.jit(do_not_specialize=["count", "groups", "groups_each"])
def four_bits(
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
    UNROLL: tl.constexpr,
    DIRECT: tl.constexpr,
) -> None:
    """x [count, K], int32 [K, N / 8], int32 [K / g, N / 8], 16-bit [K / g, N].

    Program (t, s) computes `WORDS` words of outputs of the groups from `s * groups_each` on, for
    `ROWS` rows, of which the last are repeated where there are fewer. DIRECT: to `out` [count, N],
    with `bias` if that is not None, rounded once; else to `out` fp32 [splits, count, N].
    """
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = word < words
    lanes = tl.arange(0, INPUTS)
    first = tl.program_id(1) * groups_each
    last = tl.minimum(first + groups_each, groups)
    nothing = tl.zeros([INPUTS, WORDS], tl.float32)
    # Four scales at a time: an output's own would be loads of two bytes, eight times as many.
    fours = scales.to(tl.pointer_type(tl.int64))
    kind: tl.constexpr = scales.dtype.element_ty
    total = (nothing,) * (8 * ROWS)
    for group in range(first, last):
        zero = tl.load(qzeros + group * words + word, mask=inside, other=0)
        at = (group * words + word) * 2
        low = tl.load(fours + at, mask=inside, other=0)
        high = tl.load(fours + at + 1, mask=inside, other=0)
        sums = (nothing,) * (8 * ROWS)
        for start in range(0, GROUP, INPUTS * UNROLL):
            for step in tl.static_range(UNROLL):
                place = group * GROUP + start + step * INPUTS + lanes
                packed = tl.load(
                    qweight + place[:, None] * words + word[None, :],
                    mask=inside[None, :],
                    other=0,
                    eviction_policy="evict_first",
                )
                differences = ()
                for output in tl.static_range(8):
                    exact = nibble(packed, output) - nibble(zero, output)[None, :]
                    differences = differences + (exact,)
                more = ()
                for row in tl.static_range(ROWS):
                    line = x + tl.minimum(row, count - 1) * inputs
                    value = tl.load(line + place).to(tl.float32)[:, None]
                    for output in tl.static_range(8):
                        more = more + (sums[row * 8 + output] + differences[output] * value,)
                sums = more
        scaled = ()
        for row in tl.static_range(ROWS):
            for output in tl.static_range(8):
                scale = quarter(low if output < 4 else high, output % 4, kind)
                scaled = scaled + (
                    total[row * 8 + output] + sums[row * 8 + output] * scale[None, :],
                )
        total = scaled
    for row in tl.static_range(ROWS):
        wanted = inside & (row < count)
        for output in tl.static_range(8):
            column = word * 8 + output
            value = tl.sum(total[row * 8 + output], axis=0)
            if DIRECT:
                if bias is not None:
                    value += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
                target = out + row * words * 8 + column
            else:
                target = out + (tl.program_id(1) * count + row) * words * 8 + column
            tl.store(target, value.to(out.dtype.element_ty), mask=wanted)
