"""A loaded part's units, one after the other, each on the device while it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from .feed import Feed


class UnitStream:
    """The units of a loaded part, to be used in ascending order, pass after pass.

    `streams` says whether any of them passes through a slab; where none does, waiting is free.
    """

    def __init__(
        self, units: Sequence[nn.Module], streamed: Sequence[int] = (), feed: Feed | None = None
    ) -> None:
        self._units = tuple(units)
        self._places = {index: place for place, index in enumerate(streamed)}
        self._feed = feed
        self.streams = feed is not None

    @contextmanager
    def unit(self, index: int) -> Iterator[nn.Module]:
        """Unit `index`, on the device inside the block, for compute on the current stream.

        Raises what reading it raised. Only one unit is entered at a time.
        """
        place = self._places.get(index)
        if place is None or self._feed is None:
            yield self._units[index]
            return
        try:
            self._feed.take(place)
            yield self._units[index]
        finally:
            self._feed.release(place)

    def restart(self) -> None:
        """The next unit used will be the first, though the last pass was not finished."""
        if self._feed is not None:
            self._feed.begin(0)
