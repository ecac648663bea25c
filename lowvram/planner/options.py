"""The ways to run one part of a request, the Thinker's or the Talker's, and how long each takes.

No torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from lowvram.planner.laws import CHUNKS
from lowvram.planner.phases import Home, PhaseLoad, Request
from lowvram.planner.seconds import UNPACKING_BYTES, Rates, Work
from lowvram.planner.streaming import Cut, Source, cuts
from lowvram.planner.work import (
    expected_codes,
    expected_tokens,
    stream_work,
    talk_work,
    think_works,
)
from lowvram.tensors import Part


@dataclass(frozen=True)
class Option:
    """One way: how the part is cut, where its keys and values wait, how its prompt is chunked.

    `needs` are the bytes on the device at its peak, `seconds` what its phases take besides loading.
    """

    cut: Cut
    kv: Home
    chunk: int
    needs: int
    seconds: float


@dataclass(frozen=True)
class Limits:
    """Which options are allowed: all, or those where nothing streams, with keys and values where
    `kv` says."""

    streams: bool = True
    kv: Home | None = None

    def allow(self, cut: Cut, kv: Home) -> bool:
        return (self.streams or not cut.streamed) and self.kv in (None, kv)


ANY = Limits()

_Way = tuple[Cut, Home, int, int]
"""How the part is cut, where its keys and values wait, its chunk, and the bytes it needs."""


class PartOptions:
    """Every option of one part that may be the best within some amount of memory.

    `join` gives its last phase with what runs interleaved with that, whose weights do not count
    here.
    """

    def __init__(
        self,
        request: Request,
        part: Part,
        rates: Rates,
        source: Source,
        join: Callable[[PhaseLoad], PhaseLoad] | None = None,
    ) -> None:
        self._request, self._part, self._rates = request, part, rates
        self._source, self._join = source, join
        self._ways = list(self._every_way())
        self._fronts: dict[tuple[Limits, int], list[Option]] = {}

    def fastest(self, room: int, limits: Limits, chunks: Sequence[int]) -> Option | None:
        """The option that takes the least time of those that need at most `room` bytes; a larger
        chunk goes before a smaller one, of those in `chunks`."""
        for chunk in chunks:
            front = self._front(limits, chunk)
            place = bisect_right(front, room, key=lambda option: option.needs)
            if place:
                return front[place - 1]
        return None

    def smallest(self, limits: Limits) -> int | None:
        """The fewest bytes that any needs."""
        return min((way[3] for way in self._ways if limits.allow(way[0], way[1])), default=None)

    def phases(self, option: Option) -> list[PhaseLoad]:
        """The phases of that option."""
        return self._phases(option.kv, option.chunk, bool(option.cut.streamed))

    def works(self, option: Option) -> list[Work]:
        """What each phase passes through each bottleneck, besides loading."""
        works = self._works(option.kv, option.chunk, bool(option.cut.streamed))
        return self._with_streams(works, option.cut)

    def _works(self, kv: Home, chunk: int, streams: bool) -> list[Work]:
        """Without what streaming adds."""
        if self._part == "text":
            return think_works(self._request, kv, chunk, streams)
        return [talk_work(self._request, kv, chunk, streams)]

    def _with_streams(self, works: list[Work], cut: Cut) -> list[Work]:
        """The prompt is one pass, every token and every code one more."""
        if not cut.streamed:
            return works
        request = self._request
        if self._part == "text":
            passes = [1, expected_tokens(request)]
        else:
            passes = [1 + expected_codes(request)]
        return [
            work + stream_work(request, cut, count, self._source)
            for work, count in zip(works, passes, strict=True)
        ]

    def _front(self, limits: Limits, chunk: int) -> list[Option]:
        """Options with that chunk in the order of what they need, each faster than all before."""
        key = limits, chunk
        if key not in self._fronts:
            front: list[Option] = []
            works = {way: self._works(*way) for way in self._phase_kinds() if way[1] == chunk}
            ways = [w for w in self._ways if w[2] == chunk and limits.allow(w[0], w[1])]
            for cut, kv, _, needs in sorted(ways, key=lambda way: way[3]):
                every = self._with_streams(works[kv, chunk, bool(cut.streamed)], cut)
                seconds = sum(work.seconds(self._rates) for work in every)
                if not front or seconds < front[-1].seconds:
                    front.append(Option(cut, kv, chunk, needs, seconds))
            self._fronts[key] = front
        return self._fronts[key]

    def _phase_kinds(self) -> Iterator[tuple[Home, int, bool]]:
        """Where keys and values wait, tokens in a chunk, whether anything streams."""
        tokens = self._request.shape.tokens if self._part == "text" else self._request.talker_tokens
        # A chunk that takes the whole prompt is as good as a larger one.
        chunks = [chunk for chunk in CHUNKS if chunk == CHUNKS[0] or chunk < tokens]
        homes: Sequence[Home] = ("device",) if self._request.host_is_device else ("device", "host")
        streams = (False,) if self._part in self._request.whole else (False, True)
        yield from product(homes, chunks, streams)

    def _every_way(self) -> Iterator[_Way]:
        rates, request = self._rates, self._request
        changes = request.unpacks_streamed and not request.unpacks
        unpacking = UNPACKING_BYTES * rates.bus / rates.memory if changes else 0
        divided = cuts(request.sizes[self._part], unpacking)
        for kv, chunk, streams in self._phase_kinds():
            loads = self._phases(kv, chunk, streams)
            computing = max(one.computing for one in loads)
            loading = max(one.carry + one.loading for one in loads)
            for cut in divided:
                if bool(cut.streamed) == streams:
                    yield cut, kv, chunk, max(cut.on_device + computing, cut.held + loading)

    def _phases(self, kv: Home, chunk: int, streams: bool) -> list[PhaseLoad]:
        if self._part == "text":
            phases = self._request.think(kv, chunk, streams)
        else:
            phases = [self._request.talk(kv, chunk, streams)]
        return phases if self._join is None else [*phases[:-1], self._join(phases[-1])]
