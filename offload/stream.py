"""A loaded part's units, one after the other, each on the device while it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


class UnitStream:
    """The units of a loaded part, to be used in ascending order, pass after pass.

    `streams` says whether any of them passes through a slab; where none does, waiting is free.
    """

    def __init__(self, units: Sequence[nn.Module]) -> None:
        self._units = tuple(units)

    @property
    def streams(self) -> bool:
        return False

    @contextmanager
    def unit(self, index: int) -> Iterator[nn.Module]:
        """Unit `index`, on the device inside the block, for compute on the current stream."""
        yield self._units[index]

    def restart(self) -> None:
        """The next unit used will be the first, though the last pass was not finished."""
