"""The search for the ends of each group's range.

A value outside the range is clipped to its end; a narrower range has finer steps. The lower and
the upper end are searched independently, by the exact error of the group's share of the output:
d^T G d for a change d of its weights and the Gram matrix G of its inputs, whatever the number of
tokens. Last the step is fitted to the integers found (least squares), and kept where that helps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .search_grid import LEAST_STEP, LEVELS, MOST_STEP, Grid, full_range, grid_of

_BOTH = tuple(1 - 0.03 * i for i in range(13))
"""Shares of the full range that are tried for both ends at once."""

_ONE = tuple(0.025 * i for i in range(-6, 5) if i)
"""Shares added to what was best for both, for one end at a time."""

_LARGEST = 1.2
"""The largest share that is tried."""

_GAIN = 1e-5
"""A candidate must be better by this share: floating-point noise decides nothing."""

_BLOCK_GROUPS, _BLOCK_ROWS = 4, 1024
"""Groups and outputs that are searched at a time: small enough for a CPU's cache."""


def best_ranges(weight: Tensor, group: int, grams: Tensor | None) -> Grid:
    """Grids of weights [N, K] for inputs with Gram matrices [K/g, g, g] (None: the identity)."""
    grid = full_range(weight, group)
    grouped = weight.view(len(weight), -1, group)
    for first in range(0, grouped.shape[1], _BLOCK_GROUPS):
        groups = slice(first, first + _BLOCK_GROUPS)
        products = None if grams is None else grams[groups]
        for start in range(0, len(weight), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            block = grouped[rows, groups].transpose(0, 1).contiguous()
            found = _Search(block, products).run()
            grid.steps[rows, groups] = found.steps.T
            grid.zeros[rows, groups] = found.zeros.T
    return grid


class _Search:
    """Candidates for a block of groups w [G, R, g], and the best so far of each: grids [G, R]."""

    def __init__(self, w: Tensor, grams: Tensor | None) -> None:
        self.w, self.grams = w, grams
        self.low, self.high = w.amin(-1).clamp_(max=0.0), w.amax(-1).clamp_(min=0.0)
        self.best = grid_of(self.low, self.high)
        self.error = self._error(self._rounded(self.best), self.best)
        self.at_low = torch.ones_like(self.low)
        self.at_high = torch.ones_like(self.high)

    def run(self) -> Grid:
        for share in _BOTH[1:]:
            same = torch.full_like(self.low, share)
            self._try(same, same)
        low = self.at_low
        for shift in _ONE:
            self._try(low + shift, self.at_high)
        high = self.at_high
        for shift in _ONE:
            self._try(self.at_low, high + shift)
        self._fit()
        return self.best

    def _try(self, at_low: Tensor, at_high: Tensor) -> None:
        at_low, at_high = at_low.clamp(max=_LARGEST), at_high.clamp(max=_LARGEST)
        better = self._offer(grid_of(self.low * at_low, self.high * at_high))
        self.at_low = torch.where(better, at_low, self.at_low)
        self.at_high = torch.where(better, at_high, self.at_high)

    def _offer(self, grid: Grid) -> Tensor:
        """Take the grid where its error is smaller; returns where."""
        error = self._error(self._rounded(grid), grid)
        better = error < self.error * (1 - _GAIN)
        self.error = torch.where(better, error, self.error)
        steps = torch.where(better, grid.steps, self.best.steps)
        self.best = Grid(steps, torch.where(better, grid.zeros, self.best.zeros))
        return better

    def _rounded(self, grid: Grid) -> Tensor:
        """Integers less their zero point, [G, R, g]."""
        q = self.w * grid.steps.reciprocal().unsqueeze(-1)
        zeros = grid.zeros.unsqueeze(-1)
        # Clamping to plain numbers is several times as fast as to tensors.
        return q.round_().add_(zeros).clamp_(0, LEVELS).sub_(zeros)

    def _error(self, q: Tensor, grid: Grid) -> Tensor:
        change = q.mul_(grid.steps.unsqueeze(-1)).sub_(self.w)
        return self._product(change, change)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """a^T G b of each group and row, [G, R]."""
        moved = b if self.grams is None else torch.bmm(b, self.grams)
        return torch.linalg.vecdot(moved, a)

    def _fit(self) -> None:
        q = self._rounded(self.best)
        along, across = self._product(q, q), self._product(q, self.w)
        fits = (along > 0) & (across > 0)
        steps = torch.where(fits, across / along, self.best.steps)
        steps = steps.clamp_(LEAST_STEP, MOST_STEP).half().float()
        self._offer(Grid(steps, self.best.zeros))
