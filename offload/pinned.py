"""Pinned host memory for many buffers, without the rounding that one allocation each would cost.

torch rounds every pinned block up to a power of two: 38 MiB takes 64. So buffers stand in a few
blocks that have such a size already. Imports no torch: planning counts with it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .placement import aligned

if TYPE_CHECKING:
    import torch

    from .lane import CopyLane


def pinned_blocks(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(bytes of a block, buffers in it) for buffers of these sizes in order, with the least bytes.

    Every block is a power of two and holds whole buffers, each at an aligned place.
    """
    best: list[tuple[int, int, int]] = [
        (0, 0, 0)
    ]  # for the first i: (total, blocks, block's first)
    for stop in range(1, len(sizes) + 1):
        inside, options = 0, []
        for first in range(stop - 1, -1, -1):
            inside += aligned(sizes[first])
            total, blocks, _ = best[first]
            options.append((total + _power_of_two(inside), blocks + 1, first))
        best.append(min(options))
    found, stop = [], len(sizes)
    while stop:
        total, _, first = best[stop]
        found.append((total - best[first][0], stop - first))
        stop = first
    return found[::-1]


def pinned_bytes(sizes: Sequence[int]) -> int:
    """Bytes that `pin` takes for buffers of these sizes."""
    return sum(nbytes for nbytes, _ in pinned_blocks(sizes))


def pin(lane: CopyLane, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Pinned buffers, uint8 of at least these sizes. Raises what the host's allocator raises."""
    buffers: list[torch.Tensor] = []
    for nbytes, count in pinned_blocks(sizes):
        block = lane.host_buffer(nbytes)
        place = 0
        for size in sizes[len(buffers) : len(buffers) + count]:
            buffers.append(block[place : place + size])
            place += aligned(size)
    return buffers


def _power_of_two(nbytes: int) -> int:
    return 1 << (nbytes - 1).bit_length() if nbytes else 0
