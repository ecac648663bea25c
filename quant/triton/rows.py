"""Up to eight rows times 8-bit weights with a scale for every output."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "each"])
def eight_bits(
    x: tl.tensor,
    weights: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    each: tl.tensor,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DIRECT: tl.constexpr,
) -> None:
    """x [count, K], int8 [N, K], 16-bit [N].

    Program (t, s) computes `OUTPUTS` outputs of the inputs from `s * each` to the next `each`.
    DIRECT and the shapes of `out` as in `gemv.four_bits`.
    """
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < outputs
    lanes = tl.arange(0, INPUTS)
    nothing = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    total = (nothing,) * ROWS
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, inputs)
    for start in range(first, last, INPUTS):
        place = start + lanes
        there = place < last
        held = tl.load(
            weights + output[:, None] * inputs + place[None, :],
            mask=inside[:, None] & there[None, :],
            other=0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        more = ()
        for row in tl.static_range(ROWS):
            line = x + tl.minimum(row, count - 1) * inputs
            value = tl.load(line + place, mask=there, other=0).to(tl.float32)
            more = more + (total[row] + held * value[None, :],)
        total = more
    scale = tl.load(scales + output, mask=inside, other=0).to(tl.float32)
    for row in tl.static_range(ROWS):
        value = tl.sum(total[row], axis=1) * scale
        if DIRECT:
            if bias is not None:
                value += tl.load(bias + output, mask=inside, other=0).to(tl.float32)
            target = out + row * outputs + output
        else:
            target = out + (tl.program_id(1) * count + row) * outputs + output
        tl.store(target, value.to(out.dtype.element_ty), mask=inside & (row < count))
