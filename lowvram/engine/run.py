"""One request from prompt to last sample: which phase runs when, and what the reader gets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lowvram.checkpoint import Checkpoint
from lowvram.conversation import Prompt, Tokenizer
from lowvram.engine.context import Context
from lowvram.engine.sampling import Sampler
from lowvram.engine.speaking import Speaking, SpeechSeeds
from lowvram.engine.thinking import Draw, Thinking, dictated
from lowvram.engine.vocode import SpeechPiece
from lowvram.engine.voice import Voice
from lowvram.events import SAMPLE_RATE, AudioChunk, TextDelta
from lowvram.report import longest_gap
from lowvram.settings import GenerationSettings


class Seeds(NamedTuple):
    """Text, codes and noise draw from generators of their own, so that none shifts another."""

    text: int
    codes: int
    noise: int

    @classmethod
    def of_request(cls, seed: int) -> Seeds:
        return cls(*(seed * 3 + purpose for purpose in range(3)))


@dataclass
class Run:
    """One request while it runs, and what came of it so far. Iterate `events()` once.

    `started` is the `time.perf_counter()` at which the request came in; seconds count from it.
    """

    context: Context
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    prompt: Prompt
    settings: GenerationSettings
    voice: Voice | None
    started: float
    tokens: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    samples: list[np.ndarray] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    first_text_s: float | None = None
    first_audio_s: float | None = None
    total_s: float = 0.0

    def events(self) -> Iterator[TextDelta | AudioChunk]:
        """Text as it is written and speech as it is vocoded. Closing it stops the work."""
        # A reply of one token, such as one that ends at once, leaves nothing to say.
        speaks = self.voice is not None and self.settings.tokens > 1
        with ExitStack() as everything:
            speaking = everything.enter_context(self._speaking()) if speaks else None
            with ExitStack() as text:
                thinking = text.enter_context(self._thinking(speaks))
                self._read(thinking, speaking)
                steps = thinking.steps(self._draw(), lambda: self._needs_thinking(speaking))
                for step in text.enter_context(closing(steps)):
                    if isinstance(step, str):
                        yield self._written(step)
                    elif speaking is not None:
                        yield from map(self._said, speaking.hear(step))
            if speaking is not None:
                yield from map(self._said, speaking.finish())
        self.total_s = self._elapsed

    @property
    def _elapsed(self) -> float:
        return time.perf_counter() - self.started

    def _written(self, text: str) -> TextDelta:
        if self.first_text_s is None:
            self.first_text_s = self._elapsed
        self.text.append(text)
        return TextDelta(text)

    def _said(self, piece: SpeechPiece) -> AudioChunk:
        if self.first_audio_s is None:
            self.first_audio_s = self._elapsed
        start_s = sum(map(len, self.samples)) / SAMPLE_RATE
        self.samples.append(piece.samples)
        self.arrivals.append(self._elapsed)
        return AudioChunk(piece.samples, SAMPLE_RATE, start_s, piece.codes)

    @property
    def longest_gap_s(self) -> float | None:
        """The longest silence of a listener who plays each chunk as soon as it is there."""
        return longest_gap(self.arrivals, [len(piece) / SAMPLE_RATE for piece in self.samples])

    @property
    def audio(self) -> np.ndarray | None:
        """The speech so far, float32 mono; None where none was asked for."""
        if self.voice is None:
            return None
        return np.concatenate([np.zeros(0, np.float32), *self.samples])

    @property
    def _seeds(self) -> Seeds:
        return Seeds.of_request(self.settings.seed)

    def _thinking(self, speaks: bool) -> Thinking:
        return Thinking(
            self.context,
            self.checkpoint,
            self.tokenizer,
            self.prompt,
            self.tokens,
            max_new_tokens=self.settings.tokens,
            speaks=speaks,
        )

    def _speaking(self) -> Speaking:
        assert self.voice is not None
        seeds = self._seeds
        return Speaking(
            self.context,
            self.checkpoint,
            self.prompt.positions,
            self.voice,
            self.settings,
            SpeechSeeds(seeds.codes, seeds.noise),
            self.codes,
        )

    def _read(self, thinking: Thinking, speaking: Speaking | None) -> None:
        states = thinking.read()
        if speaking is not None and states is not None:
            speaking.prompt(states)

    def _needs_thinking(self, speaking: Speaking | None) -> bool:
        """Whether anything follows from what the Thinker still computes: a reply that is given only
        has states, for speech."""
        return self.settings.reply is None or (speaking is not None and not speaking.settled)

    def _draw(self) -> Draw:
        settings = self.settings
        if settings.reply is not None:
            return dictated(settings.reply, min(self.checkpoint.generation.eos_token_ids))
        return Sampler(settings.sampling, seed=self._seeds.text, history=self.prompt.ids.tolist())
