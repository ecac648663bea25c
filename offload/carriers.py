"""How a streamed unit gets into its slab: read from the file, or copied out of pinned memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from .blob import BlobReader
from .lane import CopyLane, Mark
from .slabs import Slabs

_THREAD = "lowvram-reader"


class Ticket(Protocol):
    """One unit on its way."""

    def wait(self) -> None:
        """Compute from here on finds the unit in its slab. Raises what went wrong on the way."""

    def cancel(self) -> None:
        """It is no longer wanted: leave it where it is, if it has not set out yet."""


class Carrier(Protocol):
    """Brings units into slabs, in the order asked for."""

    def fetch(self, unit: int, slab: int) -> Ticket:
        """Bring the unit to the slab once that is free. Returns at once."""

    def used(self, slab: int) -> None:
        """Compute queued so far is the last to use what is in the slab now."""

    def close(self) -> None:
        """Return when nothing is under way any more."""


@dataclass(frozen=True)
class _Arrived:
    """Nothing to wait for."""

    def wait(self) -> None:
        return

    def cancel(self) -> None:
        return


class NoCarrier:
    """On `meta`: nothing moves."""

    def fetch(self, unit: int, slab: int) -> Ticket:
        return _Arrived()

    def used(self, slab: int) -> None:
        """Nothing is queued."""

    def close(self) -> None:
        """Nothing is under way."""


@dataclass(frozen=True)
class _Read:
    done: Future[None]

    def wait(self) -> None:
        self.done.result()

    def cancel(self) -> None:
        self.done.cancel()


class FileCarrier:
    """A thread that reads straight into slabs in host memory."""

    def __init__(self, readers: Sequence[BlobReader], slabs: Slabs) -> None:
        self._readers, self._slabs = readers, slabs
        self._thread = ThreadPoolExecutor(1, _THREAD)

    def fetch(self, unit: int, slab: int) -> Ticket:
        return _Read(self._thread.submit(self._readers[unit].read, self._slabs[slab]))

    def used(self, slab: int) -> None:
        """Compute on the host is done when it returns."""

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Copy:
    lane: CopyLane
    done: Mark

    def wait(self) -> None:
        self.lane.wait(self.done)

    def cancel(self) -> None:
        """It is queued; what is copied into the slab later comes after it."""


class PinnedCarrier:
    """One copy per unit out of `masters`, pinned blobs that hold every streamed unit."""

    def __init__(self, lane: CopyLane, masters: Sequence[torch.Tensor], slabs: Slabs) -> None:
        self._lane, self._masters, self._slabs = lane, masters, slabs
        # The slabs may be memory that compute queued earlier still uses.
        self._free = [lane.compute_mark()] * len(slabs)

    def fetch(self, unit: int, slab: int) -> Ticket:
        master = self._masters[unit]
        self._lane.after(self._free[slab])
        self._lane.copy(self._slabs[slab][: len(master)], master)
        return _Copy(self._lane, self._lane.mark())

    def used(self, slab: int) -> None:
        self._free[slab] = self._lane.compute_mark()

    def close(self) -> None:
        self._lane.mark().synchronize()


@dataclass(frozen=True)
class _Carried:
    lane: CopyLane
    queued: Future[Mark]

    def wait(self) -> None:
        self.lane.wait(self.queued.result())

    def cancel(self) -> None:
        self.queued.cancel()


class RingCarrier:
    """A thread that reads into a ring of pinned buffers and queues a copy out of each."""

    def __init__(
        self,
        lane: CopyLane,
        readers: Sequence[BlobReader],
        sizes: Sequence[int],
        ring: Sequence[torch.Tensor],
        slabs: Slabs,
    ) -> None:
        self._lane, self._readers, self._sizes = lane, readers, sizes
        self._ring, self._slabs = ring, slabs
        self._busy: list[Mark | None] = [None] * len(ring)
        self._turn = 0
        self._free = [lane.compute_mark()] * len(slabs)
        self._thread = ThreadPoolExecutor(1, _THREAD)

    def fetch(self, unit: int, slab: int) -> Ticket:
        free, target = self._free[slab], self._slabs[slab][: self._sizes[unit]]
        return _Carried(self._lane, self._thread.submit(self._carry, unit, target, free))

    def _carry(self, unit: int, target: torch.Tensor, free: Mark) -> Mark:
        turn = self._turn
        self._turn = (turn + 1) % len(self._ring)
        busy, buffer = self._busy[turn], self._ring[turn]
        if busy is not None:
            busy.synchronize()
        self._readers[unit].read(buffer)
        self._lane.after(free)
        self._lane.copy(target, buffer[: len(target)])
        self._busy[turn] = done = self._lane.mark()
        return done

    def used(self, slab: int) -> None:
        self._free[slab] = self._lane.compute_mark()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._lane.mark().synchronize()
