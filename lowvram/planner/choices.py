"""Every way to run a request, and the fastest that fits. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Literal

from lowvram.planner.device import DeviceFacts
from lowvram.planner.laws import CHUNKS
from lowvram.planner.options import ANY, Limits, Option, PartOptions
from lowvram.planner.phases import PhaseLoad, Request
from lowvram.planner.seconds import ASSUMED_RATES, Work, loading
from lowvram.planner.streaming import Source
from lowvram.planner.work import (
    audio_work,
    expected_codes,
    expected_tokens,
    vision_work,
    vocode_work,
)
from lowvram.tensors import Part

MODULES: tuple[Part, ...] = ("visual", "audio", "text", "talker", "token2wav")

CHUNK_COUNTS = range(1, len(CHUNKS) + 1)


Order = Literal["together", "interleaved", "staged"]
"""When speech is made: while the Thinker writes; with the vocoder while codes are drawn; with the
vocoder after the last code."""


@dataclass(frozen=True)
class Choice:
    """One way to run a request.

    `resident` stay on the device between requests. `seconds` is the predicted end of the next such
    request, `first_sound` when its speech begins.
    """

    resident: frozenset[Part]
    order: Order
    think: Option
    talk: Option | None
    seconds: float
    first_sound: float

    @property
    def options(self) -> dict[Part, Option]:
        """Of the parts that have any."""
        found: dict[Part, Option] = {"text": self.think}
        if self.talk is not None:
            found["talker"] = self.talk
        return found


class Choices:
    """The ways to run `request` on a device; `on_device` are modules that are there already, which
    may stay although this request does not use them."""

    def __init__(
        self,
        request: Request,
        facts: DeviceFacts,
        source: Source,
        on_device: Collection[Part] = (),
    ) -> None:
        self.request, self.facts = request, facts
        self.rates = ASSUMED_RATES[facts.type]
        self.base = facts.context_bytes + facts.library_bytes + request.kept_bytes
        self.weights = {module: request.sizes[module].total for module in MODULES}
        self.towers = request.towers()
        self.vocode = request.vocode() if request.speaks else None
        used = [*(m for phase in self.towers for m in phase.modules), "text"]
        if request.speaks:
            used += ["talker", "token2wav"]
        self.used = frozenset(used)
        self._candidates = [m for m in MODULES if m in self.used or m in on_device]
        self.source = source

    @cached_property
    def think(self) -> PartOptions:
        """The Thinker."""
        return PartOptions(self.request, "text", self.rates, self.source)

    @cached_property
    def staged(self) -> PartOptions:
        """The Talker by itself."""
        return PartOptions(self.request, "talker", self.rates, self.source)

    @cached_property
    def joined(self) -> PartOptions:
        """The Talker with the vocoder."""
        end, sound = self.vocode, self.request.vocode(ended=False)
        assert end is not None
        return PartOptions(
            self.request, "talker", self.rates, self.source, lambda talk: talk.aloud(sound, end)
        )

    @cached_property
    def together(self) -> PartOptions:
        """The Thinker with Talker and vocoder, of which nothing streams."""
        return PartOptions(self.request, "text", self.rates, self.source, self.request.think_aloud)

    @cached_property
    def _whole_talker(self) -> Option:
        """The Talker as it runs together with the Thinker."""
        found = self.staged.fastest(ENDLESS, _WHOLE, CHUNKS[:1])
        assert found is not None
        return found

    @cached_property
    def works(self) -> dict[str, Work]:
        """Of the phases without options."""
        every = {"vision": vision_work, "audio": audio_work, "vocode": vocode_work}
        names = {phase.name for phase in self.towers} | ({"vocode"} if self.vocode else set())
        return {name: every[name](self.request) for name in names}

    def smallest(self, limits: Limits = ANY) -> int:
        """The lowest peak of any choice, context included.

        Raises:
            ValueError: none is within the limits.
        """
        peaks = [self._alone(phase) for phase in self.towers]
        parts = [self.think.smallest(limits)]
        if self.vocode is not None:
            peaks.append(self._alone(self.vocode))
            parts.append(self.staged.smallest(ANY))
        if None in parts:
            raise ValueError(f"no option within {limits}")
        return self.base + max(*peaks, *(part for part in parts if part is not None), 0)

    def best(self, room: int, limits: Limits = ANY) -> Choice | None:
        """The choice that ends first and speaks first, of those whose peak, context included, is at
        most `room`; among equals the one that keeps the most. `limits` are those of the Thinker."""
        # Smaller chunks are for when nothing else fits: they alone change how results are rounded,
        # and take time for little memory.
        tries = (list(self._every(room - self.base, limits, CHUNKS[:n])) for n in CHUNK_COUNTS)
        found = next(filter(None, tries), None)
        if found is None:
            return None
        return min(
            found,
            key=lambda c: (
                round(c.seconds + c.first_sound, 6),
                -sum(self.weights[m] for m in c.resident),
            ),
        )

    def beside(self, resident: Collection[Part], modules: Collection[str]) -> int:
        """Bytes of what stays, besides the modules of a phase."""
        return sum(self.weights[m] for m in resident if m not in modules)

    def _alone(self, phase: PhaseLoad) -> int:
        own = sum(self.weights[m] for m in phase.modules)
        return own + max(phase.computing, phase.carry + phase.loading)

    def _every(self, room: int, limits: Limits, chunks: Sequence[int]) -> Iterator[Choice]:
        for count in range(len(self._candidates) + 1):
            for kept in combinations(self._candidates, count):
                resident = frozenset(kept)
                if not self._towers_fit(room, resident):
                    continue
                if self._can_interleave and self._sounds_early:
                    think = self._thinking_aloud(room, resident, limits)
                    if think is not None:
                        yield self._choice(resident, "together", think, self._whole_talker)
                think = self._thinking(room, resident, limits, chunks)
                if think is None:
                    continue
                if self.vocode is None:
                    yield self._choice(resident, "staged", think, None)
                    continue
                for order in _APART if self._can_interleave else _APART[1:]:
                    talk = self._talking(room, resident, order, chunks)
                    if talk is not None:
                        yield self._choice(resident, order, think, talk)

    @property
    def _sounds_early(self) -> bool:
        """Whether anything may be heard before the text is complete. No state follows its last
        token, and a code may be known only when the next one is drawn."""
        return self.request.settings.tokens - 2 >= self.request.first_codes

    @property
    def _can_interleave(self) -> bool:
        """Shorter speech is vocoded when the Talker is done."""
        if self.vocode is None:
            return False
        return self.request.settings.codes >= self.request.first_codes

    def _towers_fit(self, room: int, resident: frozenset[Part]) -> bool:
        return all(
            self._alone(phase) + self.beside(resident, phase.modules) <= room
            for phase in self.towers
        )

    def _thinking_aloud(
        self, room: int, resident: frozenset[Part], limits: Limits
    ) -> Option | None:
        """How the Thinker runs beside Talker, vocoder and what stays; None where it does not fit,
        or is not to have its keys and values there."""
        if limits.kv == "host":
            return None
        beside = self.beside(resident | {"talker", "token2wav"}, ("text",))
        return self.together.fastest(room - beside, _WHOLE, CHUNKS[:1])

    def _thinking(
        self, room: int, resident: frozenset[Part], limits: Limits, chunks: Sequence[int]
    ) -> Option | None:
        """How the Thinker runs beside what stays; None where it does not fit."""
        if "text" in resident:
            limits = replace(limits, streams=False)
        return self.think.fastest(room - self.beside(resident, ("text",)), limits, chunks)

    def _talking(
        self, room: int, resident: frozenset[Part], order: Order, chunks: Sequence[int]
    ) -> Option | None:
        assert self.vocode is not None
        limits = Limits(streams="talker" not in resident)
        if order == "interleaved":
            beside = self.beside(resident | {"token2wav"}, ("talker",))
            return self.joined.fastest(room - beside, limits, chunks)
        if self._alone(self.vocode) + self.beside(resident, ("token2wav",)) > room:
            return None
        return self.staged.fastest(room - self.beside(resident, ("talker",)), limits, chunks)

    def _choice(
        self,
        resident: frozenset[Part],
        order: Order,
        think: Option,
        talk: Option | None,
    ) -> Choice:
        # What streams is read from the file as well, once.
        to_load = {
            m: 0.0 if m in resident else loading(self.weights[m], self.rates) for m in self.used
        }
        seconds = think.seconds + to_load["text"]
        for phase in self.towers:
            seconds += self.works[phase.name].seconds(self.rates)
            seconds += sum(to_load[m] for m in phase.modules)
        if talk is None:
            return Choice(resident, order, think, None, seconds, 0.0)
        vocoding = self.works["vocode"].seconds(self.rates)
        codes = self.request.first_codes
        share = min(1.0, codes / expected_codes(self.request))
        speech = to_load["talker"] + to_load["token2wav"]
        first = seconds + speech + share * vocoding
        first += (1 if order == "staged" else share) * talk.seconds
        if order == "together":
            # A code for every token, as long as there are tokens.
            unwritten = max(0.0, 1 - (codes + 1) / expected_tokens(self.request))
            first -= unwritten * self.think.works(think)[-1].seconds(self.rates)
        seconds += speech + talk.seconds + vocoding
        return Choice(resident, order, think, talk, seconds, first)


ENDLESS = 2**60
"""More bytes than any device has."""

_WHOLE = Limits(streams=False, kv="device")

_APART: tuple[Order, Order] = ("interleaved", "staged")
"""Orders in which the Talker waits for the Thinker."""
