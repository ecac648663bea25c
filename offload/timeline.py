"""What was held when: the most in each short stretch of time, by owner and by key. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

TIMELINE_POINTS = 1024
"""The timeline's bound: above it neighbours become one, which has the larger of their levels."""

STEP_S = 0.002
"""Stretches shorter than this are not told apart, unless their phases are."""

Held = Mapping[tuple[str, str], int]
"""Bytes by owner and key. Never changed, only replaced."""


@dataclass(frozen=True)
class TimelinePoint:
    """The most that was held from `seconds` after the start until the next point, in `phase`.

    `phase` is "" between phases. `bytes_by_key` are the bytes that somebody holds, by owner, then
    by key (the name of a module). `bytes_by_owner` sums these, and adds "activations", which no one
    holds explicitly, and "context" where the device has one.
    """

    seconds: float
    phase: str
    bytes_by_owner: dict[str, int]
    bytes_by_key: dict[str, dict[str, int]] = field(default_factory=dict)


class _Level(NamedTuple):
    """What is held at a moment, its sum, and what a phase has made for itself."""

    held: Held
    held_bytes: int
    live: int

    @property
    def total(self) -> int:
        return self.held_bytes + self.live


@dataclass
class _Stretch:
    """A stretch of time: its highest level, and the level at its end."""

    seconds: float
    phase: str
    high: _Level
    last: _Level
    last_seconds: float

    def joined(self, later: _Stretch) -> _Stretch:
        high = max(self.high, later.high, key=lambda level: level.total)
        return _Stretch(self.seconds, self.phase, high, later.last, later.last_seconds)


class Timeline:
    """Levels as they come, kept as at most `limit` points. `context` is added to all of them."""

    def __init__(self, context: int = 0, *, limit: int = TIMELINE_POINTS) -> None:
        self._context = context
        self._limit = limit
        self._step = STEP_S
        self._stretches: list[_Stretch] = []

    @property
    def phase(self) -> str:
        """That of the last level."""
        return self._stretches[-1].phase if self._stretches else ""

    @property
    def step(self) -> float:
        """Seconds that are told apart so far."""
        return self._step

    def note(self, seconds: float, phase: str, held: Held, held_bytes: int, live: int) -> None:
        """From `seconds` on that much is held, and `live` bytes besides."""
        level = _Level(held, held_bytes, live)
        now = self._stretches[-1] if self._stretches else None
        if now is not None and now.phase == phase and seconds - now.seconds < self._step:
            if level.total >= now.high.total:
                now.high = level
            now.last, now.last_seconds = level, seconds
            return
        self._stretches.append(_Stretch(seconds, phase, level, level, seconds))
        if 2 * len(self._stretches) > self._limit - 1:
            self._thin()

    def lift(self, live: int) -> None:
        """In the last stretch `live` bytes were there besides what was held."""
        now = self._stretches[-1]
        now.high = now.high._replace(live=max(live, now.high.live))
        now.last = now.last._replace(live=max(live, now.last.live))

    def points(self) -> list[TimelinePoint]:
        """In order of time; a stretch that ended lower than its highest level gives two."""
        return list(self._points())

    def _points(self) -> Iterator[TimelinePoint]:
        for stretch in self._stretches:
            yield self._point(stretch.seconds, stretch.phase, stretch.high)
            if stretch.last is not stretch.high and stretch.last != stretch.high:
                yield self._point(stretch.last_seconds, stretch.phase, stretch.last)

    def _point(self, seconds: float, phase: str, level: _Level) -> TimelinePoint:
        by_key: dict[str, dict[str, int]] = {}
        for (owner, key), nbytes in level.held.items():
            by_key.setdefault(owner, {})[key] = nbytes
        by_owner = {owner: sum(keys.values()) for owner, keys in by_key.items()}
        if self._context:
            by_owner["context"] = self._context
        if level.live:
            by_owner["activations"] = by_owner.get("activations", 0) + level.live
        return TimelinePoint(seconds, phase, by_owner, by_key)

    def _thin(self) -> None:
        """Half as many stretches: neighbours of one phase, the nearest first; then any."""
        wanted = len(self._stretches) // 2
        elapsed = self._stretches[-1].seconds - self._stretches[0].seconds
        while len(self._stretches) > wanted and self._step <= elapsed:
            self._step *= 2
            self._join(same_phase=True)
        if len(self._stretches) > wanted:
            self._join(same_phase=False)

    def _join(self, *, same_phase: bool) -> None:
        kept = self._stretches[:1]
        pair = False
        for stretch in self._stretches[1:]:
            near = stretch.seconds - kept[-1].seconds < self._step
            if (stretch.phase == kept[-1].phase and near) if same_phase else not pair:
                kept[-1] = kept[-1].joined(stretch)
                pair = True
            else:
                kept.append(stretch)
                pair = False
        self._stretches = kept
