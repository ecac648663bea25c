"""Products of a group's inputs over all calibration tokens: what compensation weighs errors by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .search_fold import GROUPS
from .search_inputs import HEADS, split
from .search_layer import Capture, LayerInputs, Weights

WHOLE = 4096
"""The most inputs whose products are kept as one matrix; of more, blocks along the diagonal are.
The products of the 18,944 inputs of a 7B's down projection would fill 1.4 GB."""


@dataclass(frozen=True)
class Products:
    """Of the inputs x [K] of one group of linears, in the layer that is packed so far.

    `own`: blocks along the diagonal of the mean of x x^T, [k, k] each and together K long.
    `lost` [K, K]: the mean of x (y - x)^T, where y are the inputs that the 16-bit layer gives;
    None where nothing before the group was rounded, or where `own` has several blocks.
    """

    own: tuple[Tensor, ...]
    lost: Tensor | None


def products(
    group: str,
    weights: Weights,
    packed: Weights,
    columns: Tensor | None,
    capture: Capture,
    inputs: LayerInputs,
    block: int,
) -> Products:
    """Run the items that are learned from through both layers.

    Args:
        group: which linears, a key of `GROUPS`.
        weights, packed: the layer, and what a reader of its packed form computes with so far.
        columns: what `packed` divides the group's inputs by, [K] or None.
        block: blocks are cut at multiples of this.
    """
    linear, first = HEADS[group], group == next(iter(GROUPS))
    sums: _Sums | None = None
    for item in split(inputs)[0]:
        x = inputs[item]
        if sums is None:
            packed = {name: tensor.to(x.dtype) for name, tensor in packed.items()}
        found = _inputs(capture(packed, item, x, linear)[linear])
        if sums is None:
            sums = _Sums(found.shape[1], block, found.device, followed=not first)
        true = _inputs(capture(weights, item, x, linear)[linear]) if sums.followed else found
        if columns is not None and sums.followed:
            true = true / columns
        sums.add(found, true)
    assert sums is not None, "a layer with inputs has items to learn from"
    return sums.products()


def _inputs(captured: Tensor) -> Tensor:
    return captured.reshape(-1, captured.shape[-1]).float()


class _Sums:
    def __init__(self, width: int, block: int, device: torch.device, *, followed: bool) -> None:
        size = block * -(-width // (block * -(-width // WHOLE)))
        self.spans = [slice(start, min(start + size, width)) for start in range(0, width, size)]
        self.tokens = 0
        sizes = [span.stop - span.start for span in self.spans]
        self.own = [torch.zeros(size, size, device=device) for size in sizes]
        self.followed = followed and len(self.spans) == 1
        self.lost = torch.zeros(width, width, device=device) if self.followed else None

    def add(self, x: Tensor, true: Tensor) -> None:
        finite = torch.isfinite(x).all(-1) & torch.isfinite(true).all(-1)
        x, true = x[finite], true[finite]
        self.tokens += len(x)
        for own, span in zip(self.own, self.spans, strict=True):
            own.addmm_(x[:, span].T, x[:, span])
        if self.lost is not None:
            self.lost.addmm_(x.T, true - x)

    def products(self) -> Products:
        tokens = max(self.tokens, 1)
        lost = None if self.lost is None else self.lost.div_(tokens)
        return Products(tuple(own.div_(tokens) for own in self.own), lost)
