"""Bytes that one 4-bit linear takes. Pure arithmetic, for planning without torch."""

from __future__ import annotations

from typing import Literal

KernelName = Literal["reference", "cpu"]

PIECE_WEIGHTS = 1 << 22
"""Weights de-quantized at a time: 16 MiB in float32, and as much again while unpacking."""


def linear_bytes(inputs: int, outputs: int, group: int, kernel: KernelName = "reference") -> int:
    """Bytes held by the weights of a linear (its bias aside) once it is ready for `kernel`.

    `reference` keeps what the file holds: 4-bit weights and zero points, 16-bit scales. `cpu`
    keeps the weights in its own order and, for every group, a 16-bit scale and a 16-bit offset.
    """
    groups = inputs // group
    weights = inputs * outputs // 2
    if kernel == "cpu":
        return weights + groups * outputs * 4
    return weights + groups * outputs // 2 + groups * outputs * 2


def scratch_bytes(inputs: int, outputs: int) -> int:
    """Bytes that a linear takes besides its weights and its result, in any kernel and phase: one
    piece of at most `PIECE_WEIGHTS`, or one column, four times over at 32 bits."""
    return 16 * max(min(PIECE_WEIGHTS, inputs * outputs), inputs * 8)
