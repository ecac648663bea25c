"""What a caller may set for one request. The command line takes its defaults from here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal

from lowvram.errors import UsageError

if TYPE_CHECKING:
    from lowvram.checkpoint import GenerationDefaults

CODES_PER_SECOND = 50
"""Codec tokens in a second of speech: 24,000 samples / (240 samples a frame x 2 frames a code)."""

MAX_NEW_TOKENS = 1024
"""Tokens of text where nobody says: `thinker_max_new_tokens` of
`Qwen2_5OmniForConditionalGeneration.generate` in transformers."""

Solver = Literal["euler", "rk4"]
SOLVERS: tuple[Solver, ...] = ("euler", "rk4")

EVALUATIONS_PER_STEP: dict[Solver, int] = {"euler": 1, "rk4": 4}
"""How often the solver asks the DiT for its velocity in a step of its time grid."""


PIECES = (2, 2, 4, 8)
"""Blocks of 12 codes in the pieces that speech is made in; the last number again and again."""

LOOK_AHEAD = 1
"""Blocks that a piece hears of what follows it."""

SEEDS = 2**62
"""Seeds lie below it: torch's generators take 64 bits, and a request draws from three of them."""


def _is_number(value: object) -> bool:
    """Whether it counts something: neither a truth value, nor endless, nor no number at all."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the next token is drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature!r}; wanted 0 (greedy) or more")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UsageError(f"top_p is {self.top_p!r}; wanted above 0 and at most 1 (1 is off)")
        if not (_is_whole(self.top_k) and self.top_k >= 0):
            raise UsageError(f"top_k is {self.top_k!r}; wanted a whole number, 0 (off) or more")
        if not (_is_number(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UsageError(
                f"repetition_penalty is {self.repetition_penalty!r}; wanted above 0 (1 is off)"
            )


TALKER_SAMPLING = SamplingSettings(temperature=0.9, top_p=0.8, top_k=40, repetition_penalty=1.05)
"""How codes are drawn: the defaults of `Qwen2_5OmniForConditionalGeneration.generate`."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """One request's settings.

    `speaker` None takes the checkpoint's first voice. `max_new_tokens` bounds the text, and
    `max_speech_seconds` the speech; they size the KV caches. None takes the checkpoint's own bound,
    and where it names none that of transformers: 1024 tokens, 4096 codes (81.92 s).
    `whole_speech` gives the sound that the utterance has when it is vocoded at once, in the same
    bounded memory; pieces of it come about two seconds later (eight with `rk4`). `pieces` and
    `look_ahead` are blocks of 12 codes: how long the pieces of speech are, and how much of what
    follows they hear (see `VocodeSettings`). `reply` are the tokens of the reply where it is given
    and not drawn; `max_new_tokens` then has one more.
    """

    speech: bool = True
    speaker: str | None = None
    max_new_tokens: int | None = None
    max_speech_seconds: float | None = None
    sampling: SamplingSettings = SamplingSettings()
    talker_sampling: SamplingSettings = TALKER_SAMPLING
    seed: int = 0
    solver: Solver = "euler"
    whole_speech: bool = False
    pieces: tuple[int, ...] = PIECES
    look_ahead: int = LOOK_AHEAD
    reply: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        tokens, seconds = self.max_new_tokens, self.max_speech_seconds
        if tokens is not None and not (_is_whole(tokens) and tokens >= 1):
            raise UsageError(f"max_new_tokens is {tokens!r}; wanted a whole number, 1 or more")
        if seconds is not None and not (_is_number(seconds) and seconds > 0):
            raise UsageError(f"max_speech_seconds is {seconds!r}; wanted above 0")
        if not (_is_whole(self.seed) and 0 <= self.seed < SEEDS):
            raise UsageError(f"seed is {self.seed!r}; wanted a whole number from 0 to 2**62 - 1")
        if self.solver not in SOLVERS:
            raise UsageError(f"solver is {self.solver!r}; wanted one of {', '.join(SOLVERS)}")
        if not self.pieces or not all(_is_whole(n) and n >= 1 for n in self.pieces):
            raise UsageError(f"pieces are {self.pieces}; wanted one or more blocks in each")
        if not (_is_whole(self.look_ahead) and self.look_ahead >= 0):
            raise UsageError(f"look_ahead is {self.look_ahead!r}; wanted 0 or more blocks")

    def completed(self, defaults: GenerationDefaults) -> GenerationSettings:
        """The same settings with the checkpoint's bounds where they name none."""
        tokens, seconds = self.max_new_tokens, self.max_speech_seconds
        return replace(
            self,
            max_new_tokens=tokens or defaults.max_new_tokens or MAX_NEW_TOKENS,
            max_speech_seconds=seconds or defaults.max_codes / CODES_PER_SECOND,
        )

    def saying(self, reply: Sequence[int]) -> GenerationSettings:
        """The same settings for a reply that is given."""
        return replace(self, reply=tuple(reply), max_new_tokens=len(reply) + 1)

    @property
    def tokens(self) -> int:
        """Tokens of text at most."""
        return self.max_new_tokens or MAX_NEW_TOKENS

    @property
    def codes(self) -> int:
        """Codec tokens at most; of completed settings."""
        assert self.max_speech_seconds is not None
        return max(1, round(self.max_speech_seconds * CODES_PER_SECOND))
