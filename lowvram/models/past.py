"""What a piece of speech needs of the one before it: something of the DiT's last block.

Attention stays within blocks, but for layers that also see a neighbour. With the keys and values of
the block before, of the same evaluation and guidance branch, a piece continues the speech as if all
of it were there; a block that is to see the one after it waits at that layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram.config import DiTConfig

BRANCHES = 2
"""Of guidance: conditioned and not."""


@dataclass(frozen=True, eq=False)
class Neighbour:
    """The block before a piece, for one layer in one evaluation.

    `kept` is [2, branches, block, heads, head_dim], keys before rotation and values. `there` says
    whether it holds a block. The block that ends with frame `final` of the piece takes its place;
    None keeps nothing.
    """

    kept: Tensor
    there: bool
    final: int | None

    def joined(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [branches, T, heads, head_dim] of a piece, with those of before."""
        joined = k, v
        if self.there:
            joined = torch.cat((self.kept[0], k), dim=1), torch.cat((self.kept[1], v), dim=1)
        if self.final is not None:
            last = slice(self.final - self.kept.shape[2], self.final)
            self.kept[0].copy_(k[:, last])
            self.kept[1].copy_(v[:, last])
        return joined


@dataclass(frozen=True, eq=False)
class Held:
    """The block that waits before a layer that looks ahead, in one evaluation.

    `kept` is [branches, block, hidden], the layer's input, of which the first `before` frames wait.
    With what comes now, `frames` are let through, and the others wait in their place.
    """

    kept: Tensor
    before: int
    frames: int

    def joined(self, x: Tensor) -> Tensor:
        """The layer's input [branches, T, hidden] with what waited before it."""
        if self.before:
            x = torch.cat((self.kept[:, : self.before], x), dim=1)
        waits = x[:, self.frames :]
        self.kept[:, : waits.shape[1]] = waits
        return x


class Past:
    """The last final block of an utterance, for every evaluation of the solver.

    With the published shapes and nine evaluations 7.1 MB in fp32, whatever the speech's length.
    """

    def __init__(
        self, config: DiTConfig, evaluations: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        layers = len(config.look_backward_layers)
        self._block = config.block_size
        block = (2, BRANCHES, config.block_size, config.num_attention_heads, config.head_dim)
        self._shape = (evaluations, layers, *block)
        self._device, self._dtype = device, dtype
        self._kept: Tensor | None = None
        self._there = False

    @property
    def frames(self) -> int:
        """Mel frames before the next piece whose keys and values are here."""
        return self._block if self._there else 0

    def neighbours(self, evaluation: int, final: int | None) -> list[Neighbour]:
        """One for each layer that looks back, in one evaluation of a piece; see `Neighbour`.

        There is none for a piece that nothing comes before and nothing after.
        """
        if self._kept is None:
            if final is None:
                return []
            self._kept = torch.empty(self._shape, device=self._device, dtype=self._dtype)
        return [Neighbour(kept, self._there, final) for kept in self._kept[evaluation]]

    def neighbour(self, evaluation: int, layer: int, there: bool, final: int | None) -> Neighbour:
        """Of one of the layers that look back, counted among these."""
        if self._kept is None:
            self._kept = torch.empty(self._shape, device=self._device, dtype=self._dtype)
        return Neighbour(self._kept[evaluation, layer], there, final)

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept."""
        return [] if self._kept is None else [self._kept]

    def advance(self) -> None:
        """The next piece begins where the final frames of this one ended."""
        self._there = True
