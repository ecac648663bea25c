"""Into how many pieces an output head is cut: the same for every budget. No torch."""

from __future__ import annotations

PIECE_BYTES = 32 << 20
"""Of one piece at most: below the smallest decoder layer of a published checkpoint (38 MiB in the
3B's AWQ), so that a head that is streamed needs no larger slab than the layers do."""

_STEP = 64  # rows; every backend's tile sizes divide it


def head_piece_rows(in_features: int, itemsize: int) -> int:
    """Rows of each piece but the last, of a head of `in_features` inputs at `itemsize` bytes."""
    rows = PIECE_BYTES // (in_features * itemsize)
    return max(_STEP, rows // _STEP * _STEP)
