"""What a listener would hear, worked out from step times: when sound begins, and whether it stops.

One device does one thing at a time, so everything waits for what was begun before it. No torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lowvram.engine.pieces import Pass, Schedule, VocodeSettings, passes
from lowvram.errors import UsageError
from lowvram.report.timing import longest_gap
from lowvram.settings import CODES_PER_SECOND

Order = Literal["interleaved", "staged", "apart"]
"""`interleaved`: a Talker step as soon as its reply state exists, a pass of the vocoder as soon as
its codes do. `staged`: the whole text first, then Talker and vocoder interleaved. `apart`: text,
then all codes, then all sound."""

ORDERS: tuple[Order, ...] = ("interleaved", "staged", "apart")

FRAMES_PER_SECOND = 100
"""Of mel: two for each code."""

VOCODER_SHARE = 0.032
"""Operations of the vocoder for a mel frame over those of the DiT's nine evaluations: 1.92e9 over
59.8e9 at the published shapes. Splits a time in which both ran."""

SLOWEST_CODE_S, FASTEST_CODE_S = 1e3, 1e-9
"""Between these speeds are looked for."""

GAP_RESOLUTION = 1e-3
"""Seconds. Silences that differ by less are the same to a listener."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """How long the device takes, in seconds.

    `think_s` for a token of the reply, `talk_s` for a code; `mel_s` and `wave_s` for each mel frame
    that a pass of the DiT (all its evaluations) and of the vocoder covers, context included, and
    `pass_s` for any pass besides.
    """

    think_s: float = 0.0
    talk_s: float
    mel_s: float
    wave_s: float = 0.0
    pass_s: float = 0.0

    def __post_init__(self) -> None:
        seen = (self.think_s, self.talk_s, self.mel_s, self.wave_s, self.pass_s)
        if not all(0 <= seconds < float("inf") for seconds in seen):
            raise UsageError(f"step times are {seen} seconds; wanted finite numbers, 0 or more")

    def of_pass(self, step: Pass) -> float:
        """Seconds of one pass."""
        frames_per_code = FRAMES_PER_SECOND // CODES_PER_SECOND
        if step.stage == "mel":
            return self.pass_s + self.mel_s * step.length * frames_per_code
        return self.pass_s + self.wave_s * step.length

    @classmethod
    def of_report(
        cls, told: Mapping[str, Any], settings: VocodeSettings | None = None
    ) -> StepTimes:
        """From a `Report` as JSON (`--report FILE.json`) of a request that spoke.

        `settings` are those the request ran with. Loading counts as part of the steps.

        Raises:
            UsageError: the report does not tell what a reply with speech took.
        """
        spent = told.get("phase_seconds", {})
        codes, tokens = told.get("codes", 0), told.get("reply_tokens", 0)
        if not (codes and spent.get("talk") and spent.get("vocode")):
            raise UsageError(
                "the report has no codes, or no times of talk and vocode; "
                "wanted the JSON of a request that spoke"
            )
        weights = cls(talk_s=0.0, mel_s=1.0, wave_s=VOCODER_SHARE)
        each = spent["vocode"] / sum(map(weights.of_pass, passes(settings or DEFAULTS, codes)))
        return cls(
            think_s=spent.get("decode", 0.0) / max(tokens, 1),
            talk_s=spent["talk"] / codes,
            mel_s=each,
            wave_s=each * VOCODER_SHARE,
        )


DEFAULTS = VocodeSettings()


@dataclass(frozen=True)
class Heard:
    """When each chunk of sound is there, and how long it plays; seconds from the first token on.

    `total_s` is when the last step is done.
    """

    arrivals: tuple[float, ...]
    lengths: tuple[float, ...]
    total_s: float

    @property
    def first_sound_s(self) -> float | None:
        return self.arrivals[0] if self.arrivals else None

    @property
    def longest_gap_s(self) -> float:
        """The longest silence of a listener who plays each chunk as it comes."""
        return longest_gap(self.arrivals, self.lengths) or 0.0

    @property
    def smooth_from_s(self) -> float | None:
        """When a listener has to press play to hear all of it without a silence."""
        played = [0.0, *itertools.accumulate(self.lengths)]
        starts = (arrived - before for arrived, before in zip(self.arrivals, played, strict=False))
        return max(starts, default=None)


class _Device:
    """Does one thing after the other, and notes what a listener gets."""

    def __init__(self, times: StepTimes, settings: VocodeSettings) -> None:
        self.now = 0.0
        self.arrivals: list[float] = []
        self.lengths: list[float] = []
        self.schedule = Schedule(settings)
        self._times = times

    def think(self, steps: int) -> None:
        self.now += steps * self._times.think_s

    def talk(self) -> None:
        self.now += self._times.talk_s
        self.schedule.add(1)

    def vocode(self) -> None:
        """Every pass that is possible by now."""
        while step := self.schedule.next():
            self.now += self._times.of_pass(step)
            self.schedule.done(step)
            if step.stage == "wave":
                self.arrivals.append(self.now)
                self.lengths.append((step.keep_to - step.keep_from) / FRAMES_PER_SECOND)


def listen(
    times: StepTimes,
    settings: VocodeSettings = DEFAULTS,
    *,
    codes: int,
    tokens: int = 1,
    order: Order = "interleaved",
) -> Heard:
    """Plays through a reply of so many tokens, the first of which is there at 0, and codes.

    A token that is fed back gives a reply state, and each code until these run out needs the next.
    Sound that is still wanted when the codes end comes before the text that is still wanted.
    """
    device, states = _Device(times, settings), max(tokens - 1, 1)
    if order != "interleaved":
        device.think(states)
    for code in range(codes):
        if order == "interleaved" and code < states:
            device.think(1)
        device.talk()
        if order != "apart":
            device.vocode()
    device.schedule.finish()
    device.vocode()
    if order == "interleaved":
        device.think(max(0, states - codes))
    return Heard(tuple(device.arrivals), tuple(device.lengths), device.now)


def enough_codes_per_s(
    times: StepTimes,
    settings: VocodeSettings = DEFAULTS,
    *,
    codes: int,
    tokens: int = 1,
    order: Order = "interleaved",
) -> float | None:
    """The least speed of the Talker, to 0.1 %, from which on the listener of this reply never waits
    once sound began; `times.talk_s` does not count. None where not even codes in no time are
    enough, 0 where any speed is."""

    def waits(talk_s: float) -> bool:
        heard = listen(
            replace(times, talk_s=talk_s), settings, codes=codes, tokens=tokens, order=order
        )
        return heard.longest_gap_s > GAP_RESOLUTION

    if waits(0.0):
        return None
    if not waits(SLOWEST_CODE_S):
        return 0.0
    # A faster Talker never makes anybody wait longer: everything after it moves forward.
    fine, late = 0.0, SLOWEST_CODE_S
    while late > 1.001 * fine and late > FASTEST_CODE_S:
        middle = (fine + late) / 2
        fine, late = (fine, middle) if waits(middle) else (middle, late)
    return 1 / fine if fine else None


def best_blocks(
    times: StepTimes,
    choices: Sequence[tuple[int, ...]],
    settings: VocodeSettings = DEFAULTS,
    *,
    codes: int,
    tokens: int = 1,
    order: Order = "interleaved",
) -> tuple[int, ...]:
    """The list of blocks with the shortest longest silence; of several, with the earliest sound,
    then the one that is done first, then the first of them."""

    def dislike(blocks: tuple[int, ...]) -> tuple[float, float, float]:
        heard = listen(
            times, replace(settings, blocks=blocks), codes=codes, tokens=tokens, order=order
        )
        gap = round(heard.longest_gap_s / GAP_RESOLUTION)
        return gap, heard.first_sound_s or 0.0, heard.total_s

    return min(choices, key=dislike)
