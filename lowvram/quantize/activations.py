"""The inputs of a decoder layer, one tensor for each conversation: in memory while they fit, on
disk beyond that. The bytes are the same either way.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Activations(Sequence[Tensor]):
    """`len()` conversations; `[i]` is [T_i, H] on `device`. Set with `[i] = tensor`.

    The first ones that fit into `budget` bytes stay in memory, the others lie in files of `folder`,
    which is made when it is needed.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        width: int,
        dtype: torch.dtype,
        *,
        budget: int,
        folder: Path,
        device: torch.device,
        held_out: frozenset[int] = frozenset(),
    ) -> None:
        self.tokens, self.width, self.dtype = tuple(tokens), width, dtype
        self.held_out = held_out
        self._folder, self._device = folder, device
        self._kept: dict[int, Tensor] = {}
        self._spilled = frozenset(_beyond([self.nbytes(i) for i in range(len(tokens))], budget))

    def __len__(self) -> int:
        return len(self.tokens)

    def nbytes(self, index: int) -> int:
        return self.tokens[index] * self.width * self.dtype.itemsize

    @property
    def spilled(self) -> frozenset[int]:
        """Which conversations wait on disk."""
        return self._spilled

    @property
    def kept_bytes(self) -> int:
        """Bytes that are in memory when every conversation was set."""
        return sum(self.nbytes(i) for i in range(len(self)) if i not in self._spilled)

    def __setitem__(self, index: int, value: Tensor) -> None:
        assert value.shape == (self.tokens[index], self.width), "one row for each token"
        value = value.detach().to("cpu", self.dtype).contiguous()
        if index not in self._spilled:
            self._kept[index] = value.clone()
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        value.view(-1).view(torch.uint8).numpy().tofile(self._path(index))

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index not in self._spilled:
            return self._kept[index].to(self._device)
        stored = torch.from_numpy(np.fromfile(self._path(index), np.uint8))
        return stored.view(self.dtype).view(-1, self.width).to(self._device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        """Give memory and disk back."""
        self._kept.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:05d}.bin"


def _beyond(sizes: Sequence[int], budget: int) -> Iterator[int]:
    """Which of the sizes, taken in order, no longer fit."""
    held = 0
    for index, size in enumerate(sizes):
        if held + size <= budget:
            held += size
        else:
            yield index
