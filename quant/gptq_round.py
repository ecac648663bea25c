"""Rounding that compensates: what the rounding of one weight does to an output, others make up for.

The error of an output is r^T H r for the change r of its weights, with H the mean of x x^T over the
inputs x. First GPTQ (Frantar et al., arXiv 2210.17323), written as a nearest-plane search: with
H = L^T D L and L unit lower triangular, the weights are rounded one after the other, each to the
value of its grid that is nearest to itself plus the part of the earlier errors that L hands to it.
Then sweeps of descent by coordinates, which see later weights too: each weight goes to its best
value given all others, and each group's step to its best given the integers. Neither step ever
makes r^T H r larger. Weights are worked on as [K, n], n outputs at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .search_grid import LEAST_STEP, LEVELS, MOST_STEP, Grid

_BLOCK = 128
"""Weights that are rounded between two products of matrices."""

_ROWS = 2048
"""Outputs that are worked on at a time."""

_LEAST = 1e-3
"""Share of the mean energy that the damping takes an input to have at least."""

_GAIN = 1e-6
"""A change must lower its part of the error by this share: floating-point noise decides nothing."""


@dataclass(frozen=True)
class Feedback:
    """Which weight is rounded when, and what it gets of the errors before it.

    `order` int64 [K]: the k-th weight to be rounded. `products` [K, K] (H, damped) and `shares`
    [K, K] (L without its diagonal) are float32, in that order.
    """

    order: Tensor
    products: Tensor
    shares: Tensor


def feedback(products: Tensor, damping: float) -> Feedback:
    """For products H [K, K]. Inputs with the most energy are rounded first, while the most others
    are left to make up for them.
    """
    order = products.diagonal().argsort(descending=True, stable=True)
    damped, lower = factored(products[order][:, order].flip(0, 1), damping)
    # A lower factor of the flipped matrix is an upper one of the matrix: H = U U^T, L = U^T.
    shares = lower.div_(lower.diagonal().clone()).T.flip(0, 1).tril(-1)
    place = products.device
    return Feedback(order, damped.flip(0, 1).float().to(place), shares.float().to(place))


def factored(products: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Products [K, K], each input given a share of its own energy more (and of the mean's, so that
    one without any has some), and the lower factor of that; both float64, and on the host where the
    device is an NPU, which has no such numbers. Inputs without energy, or with one that overflows,
    are taken to be unrelated.
    """
    home = torch.device("cpu") if products.device.type == "npu" else products.device
    damped = products.to(home).to(torch.float64, copy=True)
    energy = damped.diagonal().clone()
    damped.diagonal().add_(damping * (energy + _LEAST * energy.mean()))
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) or not bool(torch.isfinite(lower).all()):
        damped = torch.eye(len(products), dtype=torch.float64, device=home)
        return damped, damped.clone()
    return damped, lower


def compensated(weight: Tensor, grid: Grid, given: Feedback, *, sweeps: int) -> tuple[Tensor, Grid]:
    """Weights [N, K] -> integers uint8 [N, K], and their grid with steps fitted to them.

    Between two sweeps the steps are fitted. Where inputs are unrelated nothing is to be made up
    for: these are then the nearest integers, and the grid as it was.
    """
    q = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    steps = grid.steps.clone()
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        block = _Block(weight[rows], grid.rows(rows), given)
        block.plane()
        for sweep in range(sweeps):
            if sweep:
                block.fit()
            if not block.descend():
                break
        q[rows], steps[rows] = block.integers(), block.steps.T
    return q, Grid(steps, grid.zeros)


class _Block:
    """Some outputs on their way: weights, errors and integers [K, n], in the order of rounding."""

    def __init__(self, weight: Tensor, grid: Grid, given: Feedback) -> None:
        self.given = given
        self.w = weight.T[given.order]
        self.q = torch.empty_like(self.w)
        """Less the zero point."""
        self.off = torch.zeros_like(self.w)
        self.steps, self.zeros = grid.steps.T.contiguous(), grid.zeros.T.contiguous()
        groups = given.order // (len(self.w) // len(self.steps))
        self.groups: list[int] = groups.tolist()
        self.members = [(groups == group).nonzero().view(-1) for group in range(len(self.steps))]

    def integers(self) -> Tensor:
        """uint8 [n, K], in the order of the inputs."""
        q = torch.empty_like(self.q)
        q[self.given.order] = self.q
        grouped = q.view(len(self.zeros), -1, q.shape[1]).add_(self.zeros.unsqueeze(1))
        return grouped.view_as(q).T.to(torch.uint8)

    def _nearest(self, k: int, value: Tensor) -> Tensor:
        """Integers less the zero point, [n], of values of the k-th weight."""
        zeros = self.zeros[self.groups[k]]
        q = (value / self.steps[self.groups[k]]).round_().add_(zeros)
        return q.clamp_(0, LEVELS).sub_(zeros)

    def plane(self) -> None:
        """Round each weight with what it gets of the errors before it."""
        shares = self.given.shares
        for start, stop in _spans(len(self.w)):
            wanted = torch.addmm(self.w[start:stop], shares[start:stop, :start], self.off[:start])
            for k in range(start, stop):
                q = self._nearest(k, wanted[k - start])
                self.q[k] = q
                torch.addcmul(self.w[k], q, self.steps[self.groups[k]], value=-1, out=self.off[k])
                wanted[k - start + 1 :].addr_(shares[k + 1 : stop, k], self.off[k])

    def descend(self) -> bool:
        """Move each weight to its best value given all others; whether any moved."""
        products, moved = self.given.products, False
        for start, stop in _spans(len(self.w)):
            slopes = products[start:stop] @ self.off
            for k in range(start, stop):
                steps = self.steps[self.groups[k]]
                better = slopes[k - start] / products[k, k]
                change = self._nearest(k, torch.addcmul(better, self.q[k], steps)).sub_(self.q[k])
                by = change * steps
                # Half a step away, either value is as good: noise would move it to and fro.
                by.mul_((better - by).abs_() < better.abs_().mul_(1 - _GAIN))
                if not bool(by.any()):
                    continue
                moved = True
                self.q[k].add_((by / steps).round_())
                self.off[k].sub_(by)
                slopes[k - start + 1 :].addr_(products[k + 1 : stop, k], by, alpha=-1)
        return moved

    def fit(self) -> None:
        """Move each group's step to its best value given the integers and the other steps."""
        products = self.given.products
        for group, members in enumerate(self.members):
            q, old = self.q[members], self.steps[group]
            rows = products[members]
            along = torch.linalg.vecdot(q, rows @ self.off, dim=0)
            energy = torch.linalg.vecdot(q, rows[:, members] @ q, dim=0)
            best = old + along / energy
            best = torch.where(energy > 0, best, old).clamp_(LEAST_STEP, MOST_STEP).half().float()
            by = best - old
            gain = by * (2 * along - by * energy)
            by.mul_(gain > _GAIN * along.abs() * by.abs())
            self.steps[group] += by
            self.off.index_add_(0, members, q * by, alpha=-1)


def _spans(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]
