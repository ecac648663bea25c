"""Which units of a part stay on the device and which come through slabs. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lowvram.offload import Placement
from lowvram.planner.model import PartSizes, Unit

SLABS = 2
"""Units on the device at a time: one is computed with while the next arrives. A third would wait
for the same bus."""

Source = Literal["file", "pinned", "ring"]


@dataclass(frozen=True)
class Cut:
    """One way to divide a part: the units that stream, and what follows from it in bytes.

    `held` stays on the device while the part is used; `moved` comes to it in every pass, `packed`
    4-bit weights among it. `layers` and `pieces` count the streamed units of either kind.
    """

    streamed: tuple[int, ...]
    held: int
    slab_bytes: int
    moved: int
    packed: int
    layers: int
    pieces: int

    @property
    def slabs(self) -> int:
        """Bytes of all slabs."""
        return SLABS * self.slab_bytes

    @property
    def on_device(self) -> int:
        """What stays, and the slabs."""
        return self.held + self.slabs

    def placement(self, source: Source) -> Placement | None:
        """For the loader; None where nothing streams."""
        if not self.streamed:
            return None
        return Placement(
            streamed=self.streamed, slabs=SLABS, slab_bytes=self.slab_bytes, source=source
        )


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` places, as evenly as whole numbers allow, the first place among them.

    For the units that stream: while one that stays is computed with, the next one can arrive, and
    the first arrives while the step before it is drawn.
    """
    return tuple(i * total // count for i in range(count))


def cuts(sizes: PartSizes, unpacking: float = 0.0) -> list[Cut]:
    """Every cut worth having: fewer bytes on the device than any that costs as little.

    A streamed byte costs 1, and a 4-bit weight that streams `unpacking` more: it is de-quantized by
    plain operations, where one that stays may have a product of its own.
    """
    layers = _subsets(sizes.units[: sizes.layers], 0)
    pieces = _subsets(sizes.units[sizes.layers :], sizes.layers)
    counts = sorted(set(_counts(sizes)))
    every = [_cut(sizes.total, layers[some], pieces[others]) for some, others in counts]
    every.sort(key=lambda cut: (cut.moved + unpacking * cut.packed, cut.on_device))
    found: list[Cut] = []
    for cut in every:
        if not found or cut.on_device < found[-1].on_device:
            found.append(cut)
    return found


def _counts(sizes: PartSizes) -> Iterator[tuple[int, int]]:
    """How many layers and how many pieces of the head may stream.

    A layer is larger than a piece, so between two numbers of layers a few pieces make up the
    difference, on top of none or short of all; any number goes with no layer or with every one.
    """
    pieces = len(sizes.units) - sizes.layers
    layer = max((unit.blob for unit in sizes.units[: sizes.layers]), default=0)
    piece = max((unit.blob for unit in sizes.units[sizes.layers :]), default=1)
    few = min(pieces, layer // piece)
    for layers in range(sizes.layers + 1):
        every = few if 0 < layers < sizes.layers else pieces
        for count in range(every + 1):
            yield layers, count
            yield layers, pieces - count


@dataclass(frozen=True)
class _Subset:
    """Some units of one kind that stream together."""

    streamed: tuple[int, ...]
    held: int
    moved: int
    packed: int
    largest: int


def _subsets(units: Sequence[Unit], first: int) -> list[_Subset]:
    """By how many stream. `first` is the index of the first of these units."""
    found = []
    for count in range(len(units) + 1):
        places = spread(count, len(units))
        some = [units[place] for place in places]
        found.append(
            _Subset(
                streamed=tuple(first + place for place in places),
                held=sum(unit.held for unit in some),
                moved=sum(unit.blob for unit in some),
                packed=sum(unit.packed for unit in some),
                largest=max((unit.blob for unit in some), default=0),
            )
        )
    return found


def _cut(total: int, layers: _Subset, pieces: _Subset) -> Cut:
    return Cut(
        streamed=layers.streamed + pieces.streamed,
        held=total - layers.held - pieces.held,
        slab_bytes=max(layers.largest, pieces.largest),
        moved=layers.moved + pieces.moved,
        packed=layers.packed + pieces.packed,
        layers=len(layers.streamed),
        pieces=len(pieces.streamed),
    )
