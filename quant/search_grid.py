"""The 4-bit grid of a group: its step and zero point, rounding onto it, and the stored form.

Weights here are float32 [N, K], as a linear keeps them; a group is g neighbouring inputs of one
output; steps and zero points are [N, K/g]. A step is rounded to float16, as the file will hold it,
before anything is judged by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .packing import pack

LEVELS = 15
"""The largest of the 16 values of four bits."""

LEAST_STEP = 1e-5 / LEVELS
"""A step no smaller than AutoAWQ's, so that a group of zeros has one."""

MOST_STEP = 65504.0
"""The largest float16."""

_BLOCK = 1 << 22
"""Weights that are worked on at a time."""


@dataclass(frozen=True)
class Grid:
    """Steps float32 [N, K/g] that float16 holds exactly, and zero points float32 of 0..15."""

    steps: Tensor
    zeros: Tensor

    def rows(self, part: slice) -> Grid:
        return Grid(self.steps[part], self.zeros[part])


def grid_of(low: Tensor, high: Tensor) -> Grid:
    """The grid that spans `low` to `high` (any shape), widened to hold 0."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    steps = ((high - low) / LEVELS).clamp_(LEAST_STEP, MOST_STEP).half().float()
    return Grid(steps, (low / steps).neg_().round_().clamp_(0, LEVELS))


def full_range(weight: Tensor, group: int) -> Grid:
    """The grid of each group's smallest and largest weight: what rounding to nearest uses."""
    grouped = weight.view(weight.shape[0], -1, group)
    return grid_of(grouped.amin(-1), grouped.amax(-1))


def onto(weight: Tensor, grid: Grid) -> Tensor:
    """Nearest integers 0..15 of groups [..., g] on grids [...]; float32, a tensor of its own."""
    q = weight / grid.steps.unsqueeze(-1)
    return q.round_().add_(grid.zeros.unsqueeze(-1)).clamp_(0, LEVELS)


def values(q: Tensor, grid: Grid) -> Tensor:
    """What groups of integers [..., g] stand for. Changes `q`, if it is float32, and returns it."""
    return q.float().sub_(grid.zeros.unsqueeze(-1)).mul_(grid.steps.unsqueeze(-1))


@dataclass(frozen=True)
class Coded:
    """A linear in four bits: integers uint8 [N, K] of 0..15 and their grid."""

    q: Tensor
    grid: Grid

    def dense(self, part: slice = slice(None)) -> Tensor:
        """The weights a reader will compute with, or some rows of them: float32 [N, K]."""
        q, grid = self.q[part], self.grid.rows(part)
        return values(q.view(*grid.steps.shape, -1), grid).view(q.shape)

    def stored(self) -> dict[str, Tensor]:
        """`qweight` int32 [K, N/8], `qzeros` int32 [K/g, N/8], `scales` float16 [K/g, N]."""
        return {
            "qweight": _packed(self.q),
            "qzeros": _packed(self.grid.zeros.to(torch.uint8)),
            "scales": self.grid.steps.half().T.contiguous().cpu(),
        }


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Each weight to the nearest value of its grid, whatever the others do."""
    q = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    grouped, out = weight.view(*grid.steps.shape, -1), q.view(*grid.steps.shape, -1)
    for part in row_blocks(weight):
        out[part] = onto(grouped[part], grid.rows(part))
    return q


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """The rows of [N, K], some of them at a time."""
    step = max(_BLOCK // weight.shape[1], 1)
    return (slice(start, start + step) for start in range(0, len(weight), step))


def clipped_share(weight: Tensor, grid: Grid) -> float:
    """Share of weights [N, K] that lie more than half a step outside their grid."""
    outside = 0
    grouped = weight.view(*grid.steps.shape, -1)
    for part in row_blocks(weight):
        zeros, steps = grid.zeros[part].unsqueeze(-1), grid.steps[part].unsqueeze(-1)
        q = (grouped[part] / steps).round_().add_(zeros)
        outside += int(((q < 0) | (q > LEVELS)).sum())
    return outside / weight.numel()


def _packed(q: Tensor) -> Tensor:
    """uint8 [N, R] -> int32 [R, N/8]."""
    columns = q.T.cpu().numpy()
    out = np.empty((columns.shape[0], columns.shape[1] // 8), dtype=np.int32)
    for part in row_blocks(q.T):
        out[part] = pack(np.ascontiguousarray(columns[part]))
    return torch.from_numpy(out)
