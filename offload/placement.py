"""Which units of a part stay on the device, which come through slabs, and how a unit is laid out.

Imports no torch: planning needs it as well as loading.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

BLOB_ALIGN = 512
"""Bytes at whose multiples the tensors of a blob begin: what device allocators align to."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the units of one part are while it is used.

    `streamed` are the indices, ascending, of the units that pass through slabs; all others stay.
    `slabs` is how many slabs there are (0 where nothing streams, else 2 or 3), `slab_bytes` the
    size of each: that of the largest streamed unit as a blob. `source` is where streamed units
    come from: "file" is read into the slab (cpu), "pinned" are copies in host memory that the
    device can read, made at the first load, "ring" a few such buffers fed from the file.
    """

    streamed: tuple[int, ...] = ()
    slabs: int = 0
    slab_bytes: int = 0
    source: Literal["file", "pinned", "ring"] = "file"


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to where the next tensor of a blob may begin."""
    return -(-nbytes // BLOB_ALIGN) * BLOB_ALIGN


def blob_bytes(sizes: Iterable[int]) -> int:
    """Bytes of a blob that holds tensors of these sizes side by side, each one aligned."""
    return sum(aligned(size) for size in sizes)
