"""A unit's tensors side by side in one piece of memory, so that it moves in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .header import TensorInfo
from .placement import aligned
from .skeleton import Slot, place_in_files
from .store import Store, torch_dtype

_CONVERTED_AT_ONCE = 16384
"""Elements: below what torch splits over its threads, which are the compute's."""


@dataclass(frozen=True)
class Blob:
    """Where each of a unit's tensors lies, in bytes from the start."""

    slots: tuple[Slot, ...]
    offsets: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, slots: Sequence[Slot]) -> Blob:
        offsets, total = [], 0
        for slot in slots:
            offsets.append(total)
            total += aligned(slot.empty.nbytes)
        return cls(tuple(slots), tuple(offsets), total)

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in uint8 `memory` [at least `nbytes`], in the order of `slots`."""
        return [
            memory[offset : offset + slot.empty.nbytes]
            .view(slot.empty.dtype)
            .view(slot.empty.shape)
            for slot, offset in zip(self.slots, self.offsets, strict=True)
        ]


@dataclass
class _Run:
    """Stored bytes that lie side by side in a file, and where in the blob they go."""

    info: TensorInfo
    """Of the first tensor."""
    file: Path
    offset: int
    targets: list[tuple[int, int]]
    """(offset in the blob, bytes), in file order."""
    nbytes: int


class BlobReader:
    """Reads one blob from the files: neighbours together, what has the wrong type converted."""

    def __init__(self, store: Store, blob: Blob) -> None:
        self._store, self._blob = store, blob
        self._runs: list[_Run] = []
        self._converted: list[int] = []  # places in blob.slots
        order = sorted(range(len(blob.slots)), key=lambda i: place_in_files(store, blob.slots[i]))
        for i in order:
            slot = blob.slots[i]
            info = store.info(slot.stored)
            if torch_dtype(info) != slot.empty.dtype:
                self._converted.append(i)
            elif slot.empty.nbytes:
                self._add(info, slot, blob.offsets[i])

    def _add(self, info: TensorInfo, slot: Slot, target: int) -> None:
        nbytes = slot.empty.nbytes
        start = info.offset + slot.first_element * slot.empty.element_size()
        last = self._runs[-1] if self._runs else None
        if last is None or last.file != info.file or last.offset + last.nbytes != start:
            last = _Run(info, info.file, start, [], 0)
            self._runs.append(last)
        last.targets.append((target, nbytes))
        last.nbytes += nbytes

    def read(self, memory: torch.Tensor) -> None:
        """Fill uint8 `memory` [at least the blob's bytes] on the CPU; may run on any thread."""
        place = memory.numpy().data
        for run in self._runs:
            buffers = [place[offset : offset + nbytes] for offset, nbytes in run.targets]
            self._store.read_run(run.info, run.offset - run.info.offset, buffers)
        if self._converted:
            views = self._blob.views(memory)
            for i in self._converted:
                slot = self._blob.slots[i]
                self._store.read_flat(
                    slot.stored, slot.first_element, views[i].view(-1), _CONVERTED_AT_ONCE
                )
