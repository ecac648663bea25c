"""How a row of rounded keys or values is laid out. No torch."""

from __future__ import annotations

_GROUP = 32
"""Numbers that share a scale. Keys of these models have a few channels much larger than the others:
a scale for a whole head would leave those little."""


def groups(head_dim: int) -> int:
    """Scales of a head."""
    return head_dim // _GROUP if head_dim % _GROUP == 0 else 1


def row_bytes(head_dim: int, itemsize: int) -> int:
    """A byte for each number and then the scales, of `itemsize` each."""
    return head_dim + groups(head_dim) * itemsize
