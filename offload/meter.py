"""What memory is held, by whom, and the most there was in each phase of a request."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .device import Device
from .ledger import StorageLedger
from .timeline import Timeline, TimelinePoint

OWNERS = ("weights", "slabs", "kv", "carry", "activations", "workspace")

_LEDGER_DEVICES = ("cpu", "meta")


@dataclass(frozen=True)
class PhaseMeasure:
    """One phase: seconds spent in it, and its peak in bytes.

    `peak_by_owner` is the peak's make-up and sums to `peak_bytes`; "context" stands in it where
    the device has one. What no one holds explicitly is "activations".
    """

    name: str
    seconds: float
    peak_bytes: int
    peak_by_owner: dict[str, int]


@dataclass
class _Phase:
    """The sums of one phase over its entries."""

    seconds: float = 0.0
    entries: int = 0
    peak: int = 0
    by_owner: dict[str, int] = field(default_factory=dict)


class Meter:
    """Counts what is held and how high each phase goes.

    What outlives a phase (weights, caches, what is carried to the next phase) is held explicitly,
    by `hold`. What a phase makes for itself is found out: on an accelerator from the allocator's
    statistics, elsewhere by a ledger of the storages made inside the phase. Between phases, and
    between two entries of one, nothing is counted. Not for use from several threads at once.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._has_ledger = device.type in _LEDGER_DEVICES
        self._context = device.context_bytes()
        self._held: dict[tuple[str, str], int] = {}
        self._held_by_owner: dict[str, int] = {}  # replaced, never changed: peaks refer to it
        self._held_bytes = 0
        self._ledger: StorageLedger | None = None
        self._inside = ""
        self._peak = 0
        self._peak_held: dict[str, int] = {}
        self.restart()

    def restart(self) -> None:
        """Begin a new request: phases and timeline are forgotten, what is held stays."""
        self._phases: dict[str, _Phase] = {}
        self._start = time.perf_counter()
        self._timeline = Timeline(self._context)
        self._left: float | None = None  # when the last phase was left
        self._draw()

    def hold(self, owner: str, key: str, nbytes: int, tensors: Iterable[torch.Tensor] = ()) -> None:
        """`owner` has `nbytes` on the device under `key`, instead of any before, until `release`.

        `tensors` are those bytes, where they were made inside the present phase: they no longer
        count as its activations.
        """
        if owner not in OWNERS:
            raise ValueError(f"unknown owner {owner!r}; wanted one of {', '.join(OWNERS)}")
        if self._ledger is not None:
            self._ledger.disown(tensors)
        self._set_held({**self._held, (owner, key): nbytes})
        self._note_peak()

    def release(self, owner: str, key: str) -> None:
        """The bytes held under `key` are gone. Nothing happens if there are none."""
        if (owner, key) in self._held:
            self._set_held({k: n for k, n in self._held.items() if k != (owner, key)})

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is made inside the block does not count, now or later: shapes without memory."""
        ledger = self._ledger
        if ledger is not None:
            ledger.paused = True
        try:
            yield
        finally:
            if ledger is not None:
                ledger.paused = False

    def held(self) -> dict[str, int]:
        """Bytes held now, by owner."""
        return dict(self._held_by_owner)

    @contextmanager
    def phase(self, name: str, *, stepwise: bool = False) -> Iterator[None]:
        """Count what happens inside as part of phase `name`. Phases do not nest.

        A phase may be entered many times: seconds add up, the peak is the largest of any entry.
        `stepwise` is for a phase entered once a token: the ledger, which slows every operation,
        then runs in entries 1, 2, 3, 4, 8, 16, ... only.
        """
        if self._inside:
            raise RuntimeError(f"phase {name!r} begins inside phase {self._inside!r}")
        phase = self._phases.setdefault(name, _Phase())
        phase.entries += 1
        n = phase.entries
        sampled = not stepwise or n <= 3 or n & (n - 1) == 0
        if self._timeline.phase != name:
            self._leave()
        self._inside, self._peak, self._left = name, 0, None
        self._note_peak()
        start = time.perf_counter()
        try:
            if self._has_ledger and sampled:
                self._ledger = StorageLedger(self._device.type, self._note_peak)
                with self._ledger:
                    yield
            elif self._has_ledger:
                yield
            else:
                self._device.reset_peak()
                yield
                if sampled:
                    self._device.synchronize()
        finally:
            phase.seconds += time.perf_counter() - start
            self._close(phase)

    def _close(self, phase: _Phase) -> None:
        peak = self._peak if self._has_ledger else self._device.peak_bytes()
        by_owner = dict(self._peak_held)
        if self._context:
            by_owner["context"] = self._context
        rest = max(0, peak - sum(by_owner.values()))
        by_owner["activations"] = by_owner.get("activations", 0) + rest
        peak = sum(by_owner.values())
        if peak > phase.peak or phase.entries == 1:
            phase.peak, phase.by_owner = peak, by_owner
        if not self._has_ledger:
            self._timeline.lift(rest)
        self._ledger, self._inside = None, ""
        self._left = self._now()

    @property
    def phases(self) -> list[PhaseMeasure]:
        """The phases of this request, in the order they first began."""
        return [
            PhaseMeasure(name, p.seconds, p.peak, dict(p.by_owner))
            for name, p in self._phases.items()
        ]

    @property
    def timeline(self) -> list[TimelinePoint]:
        """What was held from the start until now, at most in each short stretch."""
        self._leave()
        self._draw()
        return self._timeline.points()

    def _set_held(self, held: dict[tuple[str, str], int]) -> None:
        if not self._inside:
            self._leave()
        by_owner: dict[str, int] = {}
        for (owner, _), nbytes in held.items():
            by_owner[owner] = by_owner.get(owner, 0) + nbytes
        changed = held != self._held
        self._held, self._held_by_owner = held, by_owner
        self._held_bytes = sum(held.values())
        if changed:
            self._draw()

    def _note_peak(self) -> None:
        total = self._context + self._held_bytes + self._live
        # The last of equal peaks: tensors just handed to an owner are no longer activations.
        if total >= self._peak:
            self._peak, self._peak_held = total, self._held_by_owner
        self._draw()

    @property
    def _live(self) -> int:
        return self._ledger.live_bytes if self._ledger else 0

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _draw(self) -> None:
        """What is held now goes into the timeline."""
        self._timeline.note(self._now(), self._inside, self._held, self._held_bytes, self._live)

    def _leave(self) -> None:
        """The last phase is over: its activations are gone. Not told where another follows."""
        left, self._left = self._left, None
        if left is not None and self._now() - left >= self._timeline.step:
            self._timeline.note(left, "", self._held, self._held_bytes, 0)
