"""From the file to an accelerator through two bounded pinned buffers, nothing held twice.

While one buffer's copies run on the device, the next is filled from the file.
"""

from __future__ import annotations

import torch

from .lane import CopyLane, Mark
from .store import Store

BUFFER_BYTES = 32 << 20
"""Of each buffer: a power of two, as the pinned allocator rounds up to one anyway."""

_ALIGN = 64


class Staging:
    """Two pinned buffers in front of one copy lane; made at first use, kept until it is dropped."""

    def __init__(self, store: Store, lane: CopyLane, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._store, self._lane = store, lane
        self._buffers = [lane.host_buffer(buffer_bytes) for _ in range(2)]
        self._busy: list[Mark | None] = [None, None]
        self._now, self._used = 0, 0

    def begin(self) -> None:
        """Before the first `fill` of a module, after its memory was allocated."""
        self._lane.after_compute()

    def fill(self, name: str, out: torch.Tensor, first: int = 0) -> None:
        """Queue the copy of a stored tensor, from its element `first` on, into the contiguous `out`
        on the device."""
        flat = out.detach().view(-1)
        done, item = 0, out.element_size()
        while done < flat.numel():
            slot = self._slot((flat.numel() - done) * item, item).view(out.dtype)
            self._store.read_flat(name, first + done, slot)
            self._lane.copy(flat[done : done + slot.numel()], slot)
            done += slot.numel()

    def _slot(self, nbytes: int, item: int) -> torch.Tensor:
        """Free buffer space for up to `nbytes`, whole elements of `item` bytes."""
        if len(self._buffers[self._now]) - self._used < min(nbytes, _ALIGN):
            self._turn()
        buffer = self._buffers[self._now]
        size = min(nbytes, (len(buffer) - self._used) // item * item)
        slot = buffer[self._used : self._used + size]
        self._used += -(-size // _ALIGN) * _ALIGN
        return slot

    def _turn(self) -> None:
        """Go on in the other buffer, when the copies out of it are done."""
        self._busy[self._now] = self._lane.mark()
        self._now, self._used = 1 - self._now, 0
        busy = self._busy[self._now]
        if busy is not None:
            busy.synchronize()

    def finish(self) -> None:
        """After the last `fill` of a module: compute queued from here on waits for the copies."""
        self._lane.wait(self._lane.mark())
