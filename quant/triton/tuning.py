"""How large a piece each program computes, and into how many programs a product is split.

Reasons, none of them measured on a device so far. A product of few rows is bound by memory, so a
table has to answer two questions.

Are enough bytes under way? A read from device memory takes about 400 cycles on Ampere and Hopper
(doi:10.1016/j.ultsonch.2023.106546, table 3), 0.25 us; taken twice over, for it is more under load
and Ada is slower, and rounded up, 0.6 us. To be busy all the time a memory of
2.0 TB/s (A100 80 GB, 108 processors) needs 11 KB of requests from every processor, 4.8 TB/s (H200,
132) 22 KB, 1.0 TB/s (RTX 4090, 128) 5 KB (bandwidths: NVIDIA's data sheets). A program of 128
threads, each of which asks for eight times 16 bytes before it needs the first, has 16 KB under
way: two of them on a processor keep any of these memories busy.

Are there enough programs? Two for every processor, in two waves, so that one which ends is followed
by another: four for every processor. A linear of 3,584 outputs is 14 tiles wide, so its inputs are
split too, group by group, until there are that many; more would only write more partial sums.

The tile of one row is four words wide a thread, 128 bits, the widest load: 160 to 168 registers
(`benchmarks/triton_aot.py`), so that three programs have room on a processor. With more rows a
thread holds a sum for every row and output, so it takes fewer words.
"""

from __future__ import annotations

from typing import NamedTuple

from ..sizes import eight_bit_scratch_bytes, scratch_bytes

GEMV_ROWS, DOT_ROWS = 8, 64
"""Rows up to which weights are multiplied as they are: the tensor cores' tiles have 16."""

PROGRAMS = 4
"""For every processor."""

THREADS = 128
WARPS = THREADS // 32

REDUCED = 256
"""Outputs of which one program adds the parts."""


class Gemv(NamedTuple):
    """A tile of `gemv.four_bits`: rows; stored rows and words a step; steps asked for at once."""

    rows: int
    inputs: int
    words: int
    unroll: int


class Dot(NamedTuple):
    """A tile of `dot.four_bits_by_tiles`, and the warps that share it."""

    rows: int
    inputs: int
    words: int
    warps: int


class Rows(NamedTuple):
    """A tile of `rows.eight_bits`."""

    rows: int
    inputs: int
    outputs: int


class Unpack(NamedTuple):
    """A tile of `unpack.to_16_bits`."""

    inputs: int
    words: int


_GEMV = {
    # A thread has eight stored rows of a group of 128: each scale serves eight weights.
    1: Gemv(1, 16, 32, 8),
    2: Gemv(2, 8, 32, 4),
    # Longer steps would be compiled for minutes.
    4: Gemv(4, 4, 32, 2),
    8: Gemv(8, 4, 32, 1),
}

WIDE = 16_384
"""Outputs from which tiles are twice as wide: reads of 256 neighbouring bytes, and twice the
weights for every scale. There are tiles enough for every processor then."""


def gemv(count: int, outputs: int, group: int) -> Gemv:
    """For `count` rows of at most eight."""
    tile = _GEMV[next(rows for rows in _GEMV if count <= rows)]
    if count == 1 and outputs >= WIDE:
        tile = Gemv(1, 8, 64, 8)
    return tile._replace(unroll=min(tile.unroll, group // tile.inputs))


def dot(count: int, group: int) -> Dot:
    """For `count` rows of at most 64: 128 outputs, so that 64 bytes of every stored row are read,
    and 64 inputs, of which three steps fit into the 99 KB of shared memory of sm_86, 89 and 120."""
    padded = max(16, 1 << (count - 1).bit_length())
    # 64 rows of 128 sums, twice, are more than four warps have registers for.
    return Dot(padded, min(group, 64), 16, 8 if padded == 64 else WARPS)


def rows(count: int) -> Rows:
    """For `count` rows of at most eight: 512 bytes of each of sixteen outputs for one row, 16
    bytes at a time of four outputs a thread."""
    padded = 1 << (count - 1).bit_length()
    return Rows(padded, 512, max(4, 16 // padded))


UNPACK = Unpack(32, 32)
"""Bound by what is written: 512 bytes of neighbouring outputs, of 32 inputs that share a group."""


def splits(tiles: int, steps: int, processors: int, most: int) -> tuple[int, int]:
    """Into how many parts the inputs are split, and the steps of each, so that there are programs
    enough; at most `most` parts. Parts depend on the shape and the device, so a device gives the
    same numbers every time."""
    wanted = max(1, min(steps, -(-PROGRAMS * processors // tiles)))
    each = max(steps // wanted, -(-steps // max(most, 1)))
    return -(-steps // each), each


def most_splits(inputs: int, outputs: int, group: int, count: int) -> int:
    """Parts of `count` rows whose sums fit into the scratch that is planned for, if only one."""
    return scratch_bytes(inputs, outputs, "triton", group) // (count * outputs * 4)


def most_byte_splits(inputs: int, outputs: int, count: int) -> int:
    """The same for 8-bit weights."""
    return eight_bit_scratch_bytes(inputs, outputs) // (count * outputs * 4)
