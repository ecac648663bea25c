"""Memory over time, by who holds it: from the meter's timeline to the bands of a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Level(NamedTuple):
    """The most that was held from `seconds` on until the next level begins, in `phase`.

    `phase` is "" between phases. `held` maps an owner and the name under which it holds to bytes:
    "weights/text", "kv/thinker"; "activations" and "context" have no name.
    """

    seconds: float
    phase: str
    held: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.held.values())


class Point(Protocol):
    """What a level is made of: a `TimelinePoint` of the meter."""

    @property
    def seconds(self) -> float: ...
    @property
    def phase(self) -> str: ...
    @property
    def bytes_by_owner(self) -> Mapping[str, int]: ...
    @property
    def bytes_by_key(self) -> Mapping[str, Mapping[str, int]]: ...


def history_of(points: Iterable[Point]) -> tuple[Level, ...]:
    """Levels of the points; of the bytes of an owner, those under no key go by its name alone."""
    return tuple(Level(p.seconds, p.phase, dict(_held(p))) for p in points)


def _held(point: Point) -> Iterator[tuple[str, int]]:
    for owner, nbytes in point.bytes_by_owner.items():
        keys = point.bytes_by_key.get(owner, {})
        for key, part in keys.items():
            if part:
                yield f"{owner}/{key}", part
        if rest := nbytes - sum(keys.values()):
            yield owner, rest


@dataclass(frozen=True)
class Spell:
    """A time in which one phase ran, or none (`phase` ""); both ends in seconds."""

    phase: str
    start: float
    stop: float

    @property
    def seconds(self) -> float:
        return self.stop - self.start


def spells(history: Sequence[Level], end: float, *, shortest: float) -> list[Spell]:
    """The phases along the time axis. What lies between phases and is shorter than `shortest`
    belongs to the phase before it."""
    found: list[Spell] = []
    for level, until in zip(history, [*(h.seconds for h in history[1:]), end], strict=True):
        between = not level.phase and until - level.seconds < shortest
        if found and (found[-1].phase == level.phase or between):
            found[-1] = Spell(found[-1].phase, found[-1].start, until)
        else:
            found.append(Spell(level.phase, level.seconds, until))
    return [spell for spell in found if spell.seconds > 0]


def bands(history: Sequence[Level]) -> list[str]:
    """Every holder there was, in the order they are stacked: what stays longest lies lowest."""
    seen = {holder for level in history for holder, nbytes in level.held.items() if nbytes}
    return sorted(seen, key=_place)


_OWNERS = ("context", "weights", "slabs", "kv", "carry", "workspace", "activations")
_KEYS = ("text", "thinker", "talker", "token2wav", "audio", "visual")


def _place(holder: str) -> tuple[int, int, str]:
    owner, _, key = holder.partition("/")
    return (
        _OWNERS.index(owner) if owner in _OWNERS else len(_OWNERS),
        _KEYS.index(key) if key in _KEYS else len(_KEYS),
        holder,
    )


_NAMES = {
    "text": "text model",
    "thinker": "Thinker",
    "talker": "Talker",
    "token2wav": "vocoder",
    "audio": "audio tower",
    "visual": "vision tower",
}
_WHAT = {
    "weights": "{}",
    "slabs": "{}, streamed",
    "kv": "{} KV",
    "carry": "carried: {}",
    "workspace": "{}",
}


def label(holder: str) -> str:
    """What a reader calls that holder."""
    owner, _, key = holder.partition("/")
    if not key:
        return "driver context" if owner == "context" else owner
    return _WHAT.get(owner, "{}").format(_NAMES.get(key, key))
