"""Linears that read the same input, computed as one: q, k and v, or gate and up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn


class Joinable(nn.Module, ABC):
    """A linear that can take over the weights of others."""

    out_features: int
    joined: tuple[int, ...] = ()
    """Outputs of each of the linears that this one computes, itself first; empty if alone."""

    def after_load(self) -> None:
        """Bring what was loaded into the layout that is computed from; once."""

    @property
    @abstractmethod
    def kind(self) -> Hashable:
        """Equal for linears that one product can compute; None where nothing is gained from it."""

    @abstractmethod
    def absorb(self, others: Sequence[Self]) -> None:
        """Take over the weights of linears of the same input and kind, so that one product
        computes all. They are left without any and can no longer be called by themselves."""

    def gated(self, x: Tensor) -> Tensor | None:
        """x [..., K] -> silu of the one half of all outputs times the other, [..., N / 2]; None
        where that is not done in one go."""
        return None

    def beside(self, others: Sequence[nn.Module], x: Tensor) -> Tensor | None:
        """The outputs of this linear and of others of the same input [..., K], side by side; None
        where one product does not compute linears that are not joined."""
        return None

    def gated_with(self, up: nn.Module, x: Tensor) -> Tensor | None:
        """x [..., K] -> silu of the outputs of this linear times those of `up`, [..., N]; None
        where that is not done in one go, of linears that are not joined."""
        return None


def join(linears: Sequence[nn.Module]) -> None:
    """Have the first of several linears of one input compute all of them, where there is anything
    to gain from that. For an `after_load` of the module that owns them; parameters keep their
    names in the checkpoint, for they are joined only once they are loaded."""
    able = [linear for linear in linears if isinstance(linear, Joinable)]
    for linear in able:
        linear.after_load()
    if len(able) < len(linears) or able[0].joined:
        return
    kinds = {one.kind for one in able}
    if len(kinds) == 1 and None not in kinds:
        able[0].absorb(able[1:])


def apply_joined(linears: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    """All outputs of joined linears side by side, for x [..., K]; None if they are not joined, nor
    computed as if they were."""
    first = linears[0]
    if not isinstance(first, Joinable):
        return None
    if not first.joined:
        return first.beside(linears[1:], x)
    out: Tensor = first(x)
    return out


def apply_all(linears: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """The outputs of several linears of one input [..., K]; those of joined ones are views of one
    tensor."""
    together = apply_joined(linears, x)
    if together is None:
        return [linear(x) for linear in linears]
    widths = [one.out_features for one in linears if isinstance(one, Joinable)]
    return together.split(widths, dim=-1)


def apply_gated(gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    """`silu(gate(x)) * up(x)`, [..., K] -> [..., N]."""
    if isinstance(gate, Joinable) and len(set(gate.joined)) < 2:
        together = gate.gated(x) if gate.joined else gate.gated_with(up, x)
        if together is not None:
            return together
    opened, passed = apply_all((gate, up), x)
    # In place: the two [..., N] tensors are the peak of a decoder layer.
    return F.silu(opened, inplace=True).mul_(passed)
