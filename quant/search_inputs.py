"""What is kept of the inputs of a layer's linears: little, whatever the number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .search_layer import Capture, Forward, LayerInputs, SearchSettings, Weights

HEADS = {
    "qkv": "self_attn.q_proj",
    "o": "self_attn.o_proj",
    "gate-up": "mlp.gate_proj",
    "down": "mlp.down_proj",
}
"""Group of linears with one input -> the linear whose input is looked at."""

_RIDGE = 0.01
"""Share of the mean energy of a channel that every channel is given, so that ranges are not fitted
to directions that a few tokens happened not to have."""

_JUDGED_ROWS = 256
"""Rows of one held-out item that are judged at least, so that more than its opening is seen."""


@dataclass(frozen=True)
class Seen:
    """The inputs x [T, K] of one group of linears.

    `magnitude` [K] is the mean of |x|; `grams` [K/g, g, g] the mean of x_g x_g^T of each group of
    inputs, with a ridge; `rows` [S, K] some tokens; `held_out` [S', K] tokens of other items.
    All float32.
    """

    magnitude: Tensor
    grams: Tensor
    rows: Tensor
    held_out: Tensor

    def grams_of(self, scale: Tensor | None) -> Tensor:
        """Grams of x / scale [K]."""
        if scale is None:
            return self.grams
        inverse = scale.reciprocal().view(self.grams.shape[0], -1)
        return self.grams * inverse.unsqueeze(1) * inverse.unsqueeze(2)


class _Sums:
    """Collects what `Seen` holds."""

    def __init__(self, group: int) -> None:
        self.group, self.tokens = group, 0
        self.magnitude: Tensor | None = None
        self.grams: Tensor | None = None
        self.rows: list[Tensor] = []

    def add(self, x: Tensor, kept: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        rows = x[kept.to(x.device)].float()
        self.rows.append(rows[torch.isfinite(rows).all(-1)])
        finite = torch.isfinite(x).all(-1)
        x = (x if bool(finite.all()) else x[finite]).float()
        grouped = x.view(len(x), x.shape[-1] // self.group, self.group).transpose(0, 1)
        grams = torch.bmm(grouped.transpose(1, 2), grouped)
        magnitude = x.abs().sum(0)
        self.tokens += len(x)
        self.grams = grams if self.grams is None else self.grams.add_(grams)
        self.magnitude = magnitude if self.magnitude is None else self.magnitude.add_(magnitude)

    def seen(self, held_out: Tensor) -> Seen:
        assert self.grams is not None and self.magnitude is not None
        tokens = max(self.tokens, 1)
        grams = self.grams / tokens
        energy = float(grams.diagonal(dim1=1, dim2=2).mean()) or 1.0
        grams.diagonal(dim1=1, dim2=2).add_(_RIDGE * energy)
        return Seen(self.magnitude / tokens, grams, torch.cat(self.rows), held_out)


def split(inputs: LayerInputs) -> tuple[list[int], list[int]]:
    """Items to learn from, and items to judge by."""
    items = range(len(inputs))
    held_out = sorted(inputs.held_out & set(items))
    if not held_out:
        held_out = [items[-1]]
    learned = [item for item in items if item not in set(held_out)]
    return learned or held_out, held_out


def look(
    weights: Weights, capture: Capture, inputs: LayerInputs, settings: SearchSettings
) -> dict[str, Seen]:
    """Run every item once and keep what the search needs, by group of linears."""
    learned, held_out = split(inputs)
    sums = {group: _Sums(settings.group_size) for group in HEADS}
    for item in learned:
        x = inputs[item]
        kept = _chosen(len(x), -(-settings.search_tokens // len(learned)), settings.seed, item)
        captured = capture(weights, item, x)
        for group, linear in HEADS.items():
            sums[group].add(captured[linear], kept)
    judged: dict[str, list[Tensor]] = {group: [] for group in HEADS}
    for item in held_out:
        x = inputs[item]
        # Errors of linears are only told: half of the tokens that decide will do.
        most = -(-settings.judge_tokens // (2 * len(held_out)))
        kept = _chosen(len(x), most, settings.seed, item)
        captured = capture(weights, item, x)
        for group, linear in HEADS.items():
            rows = captured[linear].reshape(len(x), -1)
            rows = rows[kept.to(rows.device)].float()
            judged[group].append(rows[torch.isfinite(rows).all(-1)])
    return {group: sums[group].seen(torch.cat(judged[group])) for group in HEADS}


class Judge:
    """Held-out inputs of a layer and its true outputs."""

    def __init__(
        self, weights: Weights, forward: Forward, inputs: LayerInputs, settings: SearchSettings
    ) -> None:
        self._forward = forward
        _, held_out = split(inputs)
        quota = max(settings.judge_tokens // len(held_out), _JUDGED_ROWS)
        self._items: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self._energy = 0.0
        left = settings.judge_tokens
        for item in held_out:
            if left <= 0:
                break
            x = inputs[item][: min(quota, left)].float()
            y = forward(weights, item, x).float()
            # A token whose true output overflows says nothing about the packing.
            finite = torch.isfinite(y).all(-1)
            self._items.append((item, x, y, finite))
            self._energy += float((y - x)[finite].square().sum())
            left -= len(x)

    def error(self, weights: Weights) -> float:
        """Energy of the change of the outputs, as a share of the energy of what the layer adds."""
        change = 0.0
        for item, x, y, finite in self._items:
            off = self._forward(weights, item, x).float() - y
            change += float(off[finite].square().sum())
        return change / self._energy if self._energy else change


def _chosen(tokens: int, most: int, seed: int, item: int) -> Tensor:
    """At most `most` of an item's tokens, in order; the same for the same seed."""
    if tokens <= most:
        return torch.arange(tokens)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + item)
    return torch.randperm(tokens, generator=generator)[:most].sort().values
