"""Where seconds and bytes lie in a picture."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from lowvram.report.history import Spell

STEPS = [
    size * unit for unit in (1, 2**10, 2**20, 2**30) for size in (1, 2, 5, 10, 50, 100, 256, 512)
]
"""Bytes from one line of the scale to the next."""


class TimeAxis:
    """Seconds to pixels: to scale, but that every phase is at least `least` pixels wide.

    `to_scale` says whether none had to be widened.
    """

    def __init__(self, spells: Sequence[Spell], left: int, width: int, least: int) -> None:
        total = sum(spell.seconds for spell in spells) or 1.0
        named = [spell for spell in spells if spell.phase]
        least = min(least, width // max(1, len(named)))
        floors = [least if spell.phase else 0 for spell in spells]
        widths = _widths([spell.seconds / total * width for spell in spells], floors, width)
        self.to_scale = all(
            abs(wide - spell.seconds / total * width) < 1
            for wide, spell in zip(widths, spells, strict=True)
        )
        self.bounds = [float(left)]
        for wide in widths:
            self.bounds.append(self.bounds[-1] + wide)
        self._spells = list(spells)
        self._starts = [spell.start for spell in spells]

    def at(self, seconds: float) -> float:
        """The pixel at which that second lies."""
        i = max(0, bisect_right(self._starts, seconds) - 1)
        if i >= len(self._spells):
            return self.bounds[0]
        spell = self._spells[i]
        share = min(1.0, (seconds - spell.start) / (spell.seconds or 1.0))
        return self.bounds[i] + share * (self.bounds[i + 1] - self.bounds[i])


def _widths(wanted: Sequence[float], floors: Sequence[float], width: float) -> list[float]:
    """As wanted, but none below its floor; the others shrink alike."""
    fixed: set[int] = set()
    while True:
        room = width - sum(floors[i] for i in fixed)
        free = sum(wanted[i] for i in range(len(wanted)) if i not in fixed) or 1.0
        shares = [floors[i] if i in fixed else wanted[i] / free * room for i in range(len(wanted))]
        low = {i for i, share in enumerate(shares) if i not in fixed and share < floors[i]}
        if not low:
            return shares
        fixed |= low


def byte_ticks(top: int, most: int = 6) -> list[int]:
    """Round numbers from 0 up to `top`, at most `most` besides 0."""
    step = next((step for step in STEPS if top <= most * step), STEPS[-1])
    return list(range(0, top + 1, step))
