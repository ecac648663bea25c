"""What a caller may set for one request. The command line takes its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowvram.errors import UsageError

CODES_PER_SECOND = 50
"""Codec tokens in a second of speech: 24,000 samples / (240 samples a frame x 2 frames a code)."""

Solver = Literal["euler", "rk4"]
SOLVERS: tuple[Solver, ...] = ("euler", "rk4")


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the next token is drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UsageError(f"temperature is {self.temperature}; wanted 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; wanted above 0 and at most 1 (1 is off)")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; wanted 0 (off) or more")
        if self.repetition_penalty <= 0:
            raise UsageError(
                f"repetition_penalty is {self.repetition_penalty}; wanted above 0 (1 is off)"
            )


TALKER_SAMPLING = SamplingSettings(temperature=0.9, top_p=0.8, top_k=40, repetition_penalty=1.05)
"""How codes are drawn: the defaults of `Qwen2_5OmniForConditionalGeneration.generate`."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """One request's settings.

    `speaker` None takes the checkpoint's first voice. `max_speech_seconds` bounds the speech and
    sizes the Talker's KV cache; None takes the checkpoint's own bound (81.92 s = 4096 codes where
    it names none). `whole_speech` vocodes the utterance in one piece instead of in chunks.
    """

    speech: bool = True
    speaker: str | None = None
    max_new_tokens: int = 1024
    max_speech_seconds: float | None = None
    sampling: SamplingSettings = SamplingSettings()
    talker_sampling: SamplingSettings = TALKER_SAMPLING
    seed: int = 0
    solver: Solver = "euler"
    whole_speech: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; wanted 1 or more")
        if self.max_speech_seconds is not None and self.max_speech_seconds <= 0:
            raise UsageError(f"max_speech_seconds is {self.max_speech_seconds}; wanted above 0")
        if self.solver not in SOLVERS:
            raise UsageError(f"solver is {self.solver!r}; wanted one of {', '.join(SOLVERS)}")

    def max_codes(self, default: int) -> int:
        """Codec tokens at most; `default` is the checkpoint's own bound."""
        if self.max_speech_seconds is None:
            return default
        return max(1, round(self.max_speech_seconds * CODES_PER_SECOND))
