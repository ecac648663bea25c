"""The search for input scales: which channels deserve finer steps.

After AWQ (Lin et al., arXiv 2306.00978): a channel's scale is a power of the mean magnitude of its
activations, and here also a power of the inverse of its relative weights. The two exponents are
searched; having no scale is always a candidate. A candidate is judged by the change of the
linears' output, of an even choice of their rows, on sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu

from .search_fold import GROUPS, Fold, tie
from .search_grid import full_range, onto, values
from .search_inputs import Seen

_ROW_WEIGHTS = 2 << 20
"""Weights of one linear that are judged: its rows are thinned out to that."""

_LEAST_ROWS, _MOST_ROWS = 128, 512

_TOKENS = 1024
"""Tokens that candidates are judged on: twice as many gave results no better."""

_GAIN = 1e-4
"""A candidate must be better by this share: floating-point noise decides nothing."""

_WIDEST = 1e4
"""The largest ratio of a scale to the scales' middle."""

Loss = Callable[[Tensor | None], float]


def best_scale(group: str, fold: Fold, seen: Seen, group_size: int, tries: int) -> Tensor | None:
    """The best input scale of a group of linears, or None where none is better than no scale.

    float32 [K], or for "o" a value for each key/value channel.
    """
    loss = _loss(group, fold, seen, group_size)
    activations, weights = seen.magnitude, _relative_weights(group, fold, group_size)
    if group == "o":
        activations, weights = (tie(each, fold.geometry) for each in (activations, weights))
    log_x, log_w = _centred(activations), _centred(weights)

    def scale(exponents: tuple[float, float]) -> Tensor:
        a, b = exponents
        logs = a * log_x - b * log_w
        middle = (logs.max() + logs.min()) / 2
        return (logs - middle).clamp(-_LOG_WIDEST, _LOG_WIDEST).exp()

    def judged(exponents: tuple[float, float]) -> float:
        return loss(_columns(group, fold, scale(exponents)))

    best, least = _NONE, loss(None)
    tried = 0
    for line in (_activation_line, _weight_line, _fine_cross):
        for exponents in list(line(best)):
            if tried == tries:
                break
            tried += 1
            error = judged(exponents)
            if error < least * (1 - _GAIN):
                best, least = exponents, error
    return None if best == _NONE else scale(best)


_NONE = (0.0, 0.0)
_LOG_WIDEST = float(torch.tensor(_WIDEST).log())


def _activation_line(_: tuple[float, float]) -> Iterator[tuple[float, float]]:
    return ((0.1 * i, 0.0) for i in range(1, 11))


def _weight_line(best: tuple[float, float]) -> Iterator[tuple[float, float]]:
    return ((best[0], 0.25 * i) for i in (1, 2, 3, 4, -1))


def _fine_cross(best: tuple[float, float]) -> Iterator[tuple[float, float]]:
    a, b = best
    return iter(((a - 0.05, b), (a + 0.05, b), (a, b - 0.12), (a, b + 0.12), (a + 0.05, b + 0.12)))


def _columns(group: str, fold: Fold, scale: Tensor) -> Tensor | None:
    return fold.with_scale(group, scale).columns(group)


def _centred(values: Tensor) -> Tensor:
    """Logarithms about their mean; channels of 0, of which nothing is known, get the mean."""
    known = values > 0
    if not bool(known.any()):
        return torch.zeros_like(values)
    logs = torch.where(known, values, torch.ones_like(values)).log()
    return torch.where(known, logs - logs.sum() / known.sum(), torch.zeros_like(logs))


def _relative_weights(group: str, fold: Fold, group_size: int) -> Tensor:
    """Mean over the outputs of |w| as a share of the largest of its group of inputs, [K]."""
    total, rows = torch.zeros(()), 0
    for linear in GROUPS[group]:
        weight = fold.weights[f"{linear}.weight"]
        some = weight[_some_rows(weight)].float().abs()
        grouped = some.view(len(some), -1, group_size)
        largest = grouped.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        total = total.to(some.device) + (grouped / largest).view_as(some).sum(0)
        rows += len(some)
    return total / rows


def _some_rows(weight: Tensor) -> Tensor:
    """Numbers of the rows that stand for all: an even choice."""
    rows, columns = weight.shape
    wanted = min(max(_ROW_WEIGHTS // columns, _LEAST_ROWS), _MOST_ROWS, rows)
    return torch.arange(wanted, device=weight.device) * rows // wanted


def _loss(group: str, fold: Fold, seen: Seen, group_size: int) -> Loss:
    """Column scales [K] or None -> error of the outputs on the sampled tokens."""
    weights: list[Tensor] = []
    for linear in GROUPS[group]:
        weight = fold.weights[f"{linear}.weight"]
        weights.append(weight[_some_rows(weight)].float())
    x = seen.rows[:: -(-len(seen.rows) // _TOKENS) or 1]
    true = [x @ weight.T for weight in weights]

    def rounded(weight: Tensor, columns: Tensor | None) -> Tensor:
        scaled = weight if columns is None else weight * columns
        grid = full_range(scaled, group_size)
        q = onto(scaled.view(len(scaled), -1, group_size), grid)
        dense = values(q, grid).view_as(scaled)
        return dense if columns is None else dense.div_(columns)

    def of_outputs(columns: Tensor | None) -> float:
        total = 0.0
        for weight, y in zip(weights, true, strict=True):
            change = x @ (rounded(weight, columns) - weight).T
            energy = float(y.square().sum())
            total += float(change.square().sum()) / energy if energy else 0.0
        return total

    if group != "gate-up":
        return of_outputs
    down = fold.weights["mlp.down_proj.weight"]
    some = _some_rows(fold.weights["mlp.gate_proj.weight"])
    reach = down[:, some].float().square().sum(0)
    product = silu(true[0]) * true[1]

    def of_product(columns: Tensor | None) -> float:
        gate, up = (x @ rounded(weight, columns).T for weight in weights)
        change = silu(gate).mul_(up).sub_(product).square().sum(0)
        return float((change * reach).sum())

    return of_product
