"""A group of linears rounded anew on the scales and ranges that the search found.

Each linear aims at the outputs that the 16-bit layer gives, from the inputs that the layer gives
which is packed so far (Li et al., arXiv 2504.02692). With H and D the means of x x^T and of
x (y - x)^T over packed inputs x and true inputs y, the best weights are W (I + D^T H^-1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gptq_inputs import Products
from .gptq_round import compensated, factored, feedback
from .search_grid import Coded, Grid, row_blocks

DAMPING = 0.1
"""Share by which each input's energy is raised, so that errors are not moved into directions that
a few tokens happened not to have. GPTQ's authors give all inputs 0.01 of the mean, which one input
of great energy would spoil for the others; on held-out text more was better."""

SWEEPS = 2
"""Descents after the first rounding; twice as many gained a hundredth of the error."""


class Compensation:
    """For the linears of one group, all of which have the same inputs."""

    def __init__(self, found: Products) -> None:
        self._own = found.own
        # Of several blocks, which only a group of one linear has, one at a time is factored.
        self._given = feedback(found.own[0], DAMPING) if len(found.own) == 1 else None
        self._shift = _shift(found)

    def code(self, weight: Tensor, grid: Grid) -> Coded:
        """Weights [N, K], changed in place, onto the grid, whose steps are fitted anew."""
        if self._shift is not None:
            for part in row_blocks(weight):
                weight[part] += weight[part] @ self._shift
        q = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        steps = grid.steps.clone()
        size, start = weight.shape[1] // steps.shape[1], 0
        for own in self._own:
            inputs = slice(start, start + len(own))
            groups = slice(inputs.start // size, inputs.stop // size)
            some = Grid(grid.steps[:, groups], grid.zeros[:, groups])
            given = self._given or feedback(own, DAMPING)
            q[:, inputs], fitted = compensated(weight[:, inputs], some, given, sweeps=SWEEPS)
            steps[:, groups] = fitted.steps
            start = inputs.stop
        return Coded(q, Grid(steps, grid.zeros))


def _shift(found: Products) -> Tensor | None:
    """D^T H^-1 [K, K], by which weights are multiplied and then added to."""
    if found.lost is None:
        return None
    _, factor = factored(found.own[0], DAMPING)
    lost = found.lost.to(factor.device).double()
    return torch.cholesky_solve(lost, factor).T.float().to(found.lost.device)
