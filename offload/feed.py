"""The order in which streamed units pass through the slabs: round and round, always one ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .carriers import Carrier, Ticket
from .frames import clear_frames
from .slabs import Slabs


@dataclass(frozen=True)
class _Fetch:
    unit: int
    slab: int
    ticket: Ticket


class Feed:
    """Keeps every slab filled or filling with the unit that is wanted next in it.

    Units of `sizes` bytes are numbered from 0 in the order they stream. Any may be asked for; the
    one after the last is there at once, or soon.
    """

    def __init__(self, sizes: Sequence[int], slabs: Slabs, carrier: Carrier) -> None:
        self._sizes, self._count = sizes, len(sizes)
        self._slabs, self._carrier = slabs, carrier
        self._coming: deque[_Fetch] = deque()  # the first is the next to be used, or in use
        self._using: int | None = None
        self.bytes_fetched = 0

    def begin(self, unit: int) -> None:
        """Have `unit` and those after it on their way, whatever was so far."""
        self._using = None
        if self._coming and self._roomy:
            while self._coming[0].unit != unit:
                self._coming.rotate(-1)
        elif not self._coming or self._coming[0].unit != unit:
            self._forget()
            for number in range(unit, unit + min(self._count, len(self._slabs))):
                wanted = number % self._count
                slab = wanted if self._roomy else number % len(self._slabs)
                self._carrier.used(slab)
                self._fetch(wanted, slab)

    @property
    def _roomy(self) -> bool:
        """Whether every unit has a slab to itself."""
        return self._count <= len(self._slabs)

    def take(self, unit: int) -> None:
        """The unit is in its slab, for the compute queued from here on, until `release`."""
        if self._using is not None:
            raise RuntimeError("a streamed unit is asked for while another one is in use")
        if not len(self._slabs):
            raise RuntimeError("a streamed unit is asked for after its part was dropped")
        self.begin(unit)
        self._using = unit
        first = self._coming[0]
        try:
            first.ticket.wait()
        except BaseException as error:
            clear_frames(error)  # they hold on to the slab
            self._forget()
            raise
        self._slabs.bind(unit, first.slab)

    def release(self, unit: int) -> None:
        """The unit is done with; its slab takes the next one that is not on its way yet."""
        if self._using != unit:
            return
        self._using = None
        if not self._coming:  # it never came
            return
        done = self._coming.popleft()
        if self._roomy:
            self._coming.append(done)
            return
        self._carrier.used(done.slab)
        last = self._coming[-1] if self._coming else done
        self._fetch((last.unit + 1) % self._count, done.slab)

    def _fetch(self, unit: int, slab: int) -> None:
        self._coming.append(_Fetch(unit, slab, self._carrier.fetch(unit, slab)))
        self.bytes_fetched += self._sizes[unit]

    def _forget(self) -> None:
        for fetch in self._coming:
            fetch.ticket.cancel()
        self._coming.clear()

    def close(self) -> None:
        """Stop, wait for what is under way, and let go of the slabs."""
        self._forget()
        self._carrier.close()
        self._slabs.free()
