"""The memory that weights are de-quantized into: one buffer, lent to one linear at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes at whose multiples each lent tensor begins: a cache line."""

Wanted = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor to lend."""


class Scratch:
    """Lends tensors of one buffer, which grows to the largest loan and stays until `free`.

    What was lent before is overwritten by the next loan: a linear is done with its loan when it
    returns. `told(tensor)` hears of every new buffer, `told(None)` of its end.
    """

    def __init__(self, told: Callable[[Tensor | None], None] | None = None) -> None:
        self._told = told
        self._buffer: Tensor | None = None

    @property
    def buffer(self) -> Tensor | None:
        """What is lent from now, for one who has to keep it: recorded work goes on using it."""
        return self._buffer

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def take(self, device: torch.device, *wanted: Wanted) -> list[Tensor]:
        """Uninitialised tensors of these shapes and types, side by side."""
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in wanted]
        places, total = [], 0
        for size in sizes:
            places.append(total)
            total += -(-size // ALIGNMENT) * ALIGNMENT
        buffer = self._room(device, total)
        return [
            buffer[place : place + size].view(dtype).view(shape)
            for place, size, (shape, dtype) in zip(places, sizes, wanted, strict=True)
        ]

    def free(self) -> None:
        """Give the buffer back."""
        if self._buffer is not None:
            self._buffer = None
            self._tell(None)

    def _room(self, device: torch.device, nbytes: int) -> Tensor:
        held = self._buffer
        if held is not None and held.device == device and held.nbytes >= nbytes:
            return held
        del held
        self.free()
        # A plain tensor even in a caller's inference mode, so that it serves outside of it too.
        with torch.inference_mode(False):
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._tell(self._buffer)
        return self._buffer

    def _tell(self, buffer: Tensor | None) -> None:
        if self._told is not None:
            self._told(buffer)
