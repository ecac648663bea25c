"""What a piece of speech hears of the one before it: keys and values of the DiT's last block.

Attention stays within blocks, but for layers that also see the block before. With those layers'
keys and values of that one block, of the same evaluation and guidance branch, a piece continues the
speech as if all of it were there.
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


class Past:
    """The last final block of an utterance, for every evaluation of the solver.

    With the published shapes and nine evaluations 7.1 MB in fp32, whatever the speech's length.
    """

    def __init__(self, config: DiTConfig, evaluations: int, like: Tensor) -> None:
        layers = len(config.look_backward_layers)
        self._block = config.block_size
        block = (2, BRANCHES, config.block_size, config.num_attention_heads, config.head_dim)
        self._shape = (evaluations, layers, *block)
        self._like = like
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
            self._kept = self._like.new_empty(self._shape)
        return [Neighbour(kept, self._there, final) for kept in self._kept[evaluation]]

    def advance(self) -> None:
        """The next piece begins where the final frames of this one ended."""
        self._there = True
