"""Fixed memory on the device that streamed units pass through, and their tensors over it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .blob import Blob
from .placement import aligned


class Slabs:
    """`count` slabs of `slab_bytes` in one block.

    Every unit's parameters over every slab it may come to are made once, here; to bind a unit is
    to hang them in their places. With as many units as fill the slabs evenly each unit always
    comes to the same one.
    """

    def __init__(
        self, blobs: Sequence[Blob], count: int, slab_bytes: int, device: torch.device
    ) -> None:
        largest = max(blob.nbytes for blob in blobs)
        if count < 1 or slab_bytes < largest:
            raise ValueError(
                f"{count} slabs of {slab_bytes} bytes cannot take units of up to {largest} bytes"
            )
        step = aligned(slab_bytes)
        self.block = torch.empty(count * step, dtype=torch.uint8, device=device)
        self._slabs = [self.block[i * step : i * step + slab_bytes] for i in range(count)]
        self._blobs = tuple(blobs)
        self._bound: dict[int, int] = {}  # unit -> slab
        self._tensors = {
            (unit, slab): [
                nn.Parameter(view, requires_grad=False) if slot.is_parameter else view
                for slot, view in zip(blob.slots, blob.views(self._slabs[slab]), strict=True)
            ]
            for unit, blob in enumerate(self._blobs)
            for slab in self._visits(unit, count)
        }
        for unit in range(len(self._blobs)):
            self.bind(unit, unit % count)

    def _visits(self, unit: int, count: int) -> Sequence[int]:
        units = len(self._blobs)
        return (unit % count,) if units % count == 0 or units < count else range(count)

    def __len__(self) -> int:
        return len(self._slabs)

    def __getitem__(self, slab: int) -> torch.Tensor:
        return self._slabs[slab]

    def bind(self, unit: int, slab: int) -> None:
        """Have the unit's parameters and buffers lie in that slab."""
        if self._bound.get(unit) == slab:
            return
        for slot, tensor in zip(self._blobs[unit].slots, self._tensors[unit, slab], strict=True):
            held = slot.owner._parameters if slot.is_parameter else slot.owner._buffers
            held[slot.local] = tensor  # type: ignore[assignment]
        self._bound[unit] = slab

    def free(self) -> None:
        """Let go of the memory; units that are still bound to it keep it."""
        self._slabs.clear()
        self._tensors.clear()
        self._bound.clear()
        self.block = self.block.new_empty(0)
