"""Bytes that one 4-bit linear takes. Pure arithmetic, for planning without torch."""

from __future__ import annotations

from typing import Literal

KernelName = Literal["reference", "cpu"]


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
