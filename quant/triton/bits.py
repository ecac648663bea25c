"""How stored words become numbers, inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nibble(words: tl.tensor, output: tl.constexpr) -> tl.tensor:
    """Weight or zero point 0..15 of one output of eight, plus a power of two that depends on the
    output alone: the difference of two such numbers is exact in fp32.

    The nibble stays where it is: as low bits of a float's mantissa, whose exponent makes its
    lowest bit a one. That is one operation for mask and exponent, where a shift and a conversion
    from integers would be two, the latter at a quarter of the rate. Nibbles beyond the 23 bits of a
    mantissa are moved by 12 first, three of them at once.
    """
    place: tl.constexpr = (output % 2) * 16 + (output // 2) * 4
    low: tl.constexpr = place if place <= 16 else place - 12
    if place > 16:
        words = words >> 12
    return ((words & (15 << low)) | ((150 - low) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def quarter(packed: tl.tensor, index: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """One of the four 16-bit floats in each int64, in fp32."""
    return (packed >> (16 * index)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
