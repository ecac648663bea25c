"""One request from prompt to last sample: which phase runs when, and what the reader gets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from lowvram.checkpoint import Checkpoint
from lowvram.conversation import Prompt, Tokenizer
from lowvram.engine.context import Context
from lowvram.engine.encode import (
    embed_prompt,
    embed_tokens,
    encode_audio,
    encode_vision,
    media_slots,
)
from lowvram.engine.pieces import VocodeSettings
from lowvram.engine.sampling import Sampler
from lowvram.engine.talk import Speech, codec_sampler, talk
from lowvram.engine.thinker import Thinker
from lowvram.engine.vocode import NoiseSource, SpeechPiece, SpeechStream
from lowvram.engine.voice import Voice
from lowvram.events import SAMPLE_RATE, AudioChunk, TextDelta
from lowvram.models.talker import Talker
from lowvram.models.text import ThinkerText
from lowvram.models.token2wav import Token2Wav
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
    head_error: float | None = None
    _told: int = 0

    def events(self) -> Iterator[TextDelta | AudioChunk]:
        """Text as it is written, then speech as it is vocoded. Closing it stops the work."""
        speech: list[Speech] = []
        for piece in self._think(speech):
            if self.first_text_s is None:
                self.first_text_s = time.perf_counter() - self.started
            self.text.append(piece)
            yield TextDelta(piece)
        # A reply of one token, such as one that ends at once, leaves nothing to say.
        if speech:
            for chunk in self._speak(speech.pop()):
                if self.first_audio_s is None:
                    self.first_audio_s = time.perf_counter() - self.started
                self.samples.append(chunk.samples)
                self.arrivals.append(time.perf_counter() - self.started)
                yield chunk
        self.total_s = time.perf_counter() - self.started

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

    def _think(self, speech: list[Speech]) -> Iterator[str]:
        """Pieces of the reply's text; what the Talker needs goes into `speech`, if it speaks."""
        context, prompt, config = self.context, self.prompt, self.checkpoint.config.thinker
        speaks = self.voice is not None and self.settings.tokens > 1
        embeds = embed_prompt(context, prompt)
        states = torch.empty_like(embeds) if speaks else None
        replies: list[torch.Tensor] = []
        with ExitStack() as stack:
            carried = [embeds] if states is None else [embeds, states]
            stack.enter_context(context.carried("prompt", *carried))
            if prompt.vision:
                encode_vision(context, prompt, embeds)
            if prompt.audio:
                encode_audio(context, prompt, embeds, config.audio)
            with context.phase("prefill"):
                model = stack.enter_context(context.use("text", ThinkerText))
                max_tokens = len(prompt.ids) + self.settings.tokens
                cache = stack.enter_context(
                    context.kv_cache("thinker", "text", config.text, max_tokens)
                )
                thinker = Thinker(context, model, cache, context.plan.chunks["text"])
                logits = thinker.prefill(embeds, prompt.positions, states)
                self.head_error = thinker.head_error
            yield from self._decode(thinker, logits, replies)
        if states is not None and replies:
            embeds.index_fill_(0, media_slots(prompt).to(context.host), 0)
            speech.append(Speech(states.add_(embeds), torch.cat(replies), prompt.positions))

    def _decode(
        self, thinker: Thinker, logits: torch.Tensor, replies: list[torch.Tensor]
    ) -> Iterator[str]:
        """Draws tokens until the reply ends; the token that ends it is kept, but not written."""
        context, settings = self.context, self.settings
        sampler = Sampler(
            settings.sampling, seed=self._seeds.text, history=self.prompt.ids.tolist()
        )
        words = self.tokenizer.stream()
        while True:
            with context.phase("decode", stepwise=True):
                token = sampler(logits)
            self.tokens.append(token)
            if token in self.checkpoint.generation.eos_token_ids:
                break
            if piece := words.push(token):
                yield piece
            if len(self.tokens) == settings.tokens:
                break
            embed = embed_tokens(context, [token])
            position = self.prompt.next_position + len(self.tokens) - 1
            with context.phase("decode", stepwise=True):
                logits, hidden = thinker.step(embed, position)
                if self.voice is not None:
                    replies.append(context.to_host(hidden) + embed)
        if piece := words.finish():
            yield piece

    def _speak(self, speech: Speech) -> Iterator[AudioChunk]:
        """Interleaved where the plan holds Talker and vocoder together, else one after the other.

        Pieces depend on the codes alone, so both orders give the same samples.
        """
        if any(row.name == "talk+vocode" for row in self.context.plan.phases):
            with ExitStack() as stack:
                with self.context.phase("talk"):
                    stream = self._open_stream(stack)
                yield from self._vocode(stream, self._talk(speech))
            return
        codes = list(self._talk(speech))
        # On the CPU these states count, and the vocoder's phase has no room planned for them.
        del speech
        with ExitStack() as stack:
            with self.context.phase("vocode"):
                stream = self._open_stream(stack)
            yield from self._vocode(stream, iter(codes))

    def _open_stream(self, stack: ExitStack) -> SpeechStream:
        assert self.voice is not None
        token2wav = stack.enter_context(self.context.use("token2wav", Token2Wav))
        settings = VocodeSettings(solver=self.settings.solver, whole=self.settings.whole_speech)
        return SpeechStream(token2wav, self.voice, NoiseSource(self._seeds.noise), settings)

    def _talk(self, speech: Speech) -> Iterator[int]:
        context, config = self.context, self.checkpoint.config.talker
        assert config is not None and self.voice is not None
        defaults = self.checkpoint.generation
        max_codes = self.settings.codes
        max_tokens = len(speech.prompt_states) + 2 + max_codes
        with ExitStack() as stack:
            stack.enter_context(
                context.carried("states", speech.prompt_states, speech.reply_states)
            )
            with context.phase("talk"):
                model = stack.enter_context(context.use("talker", Talker))
                cache = stack.enter_context(
                    context.kv_cache("talker", "talker", config.decoder, max_tokens)
                )
            for code in talk(
                context,
                model,
                cache,
                config,
                speech,
                voice_token=self.voice.bos_token,
                sampler=codec_sampler(
                    config, self.settings.talker_sampling, seed=self._seeds.codes
                ),
                defaults=defaults,
                max_codes=max_codes,
                chunk=context.plan.chunks["talker"],
            ):
                self.codes.append(code)
                yield code

    def _vocode(self, stream: SpeechStream, codes: Iterator[int]) -> Iterator[AudioChunk]:
        """Sound as soon as a piece's codes are there, then the rest."""
        dit = self.checkpoint.config.dit
        assert dit is not None
        for code in codes:
            # Control codes have no sound of their own; the null code keeps their 20 ms.
            sound = code if code <= dit.num_embeds else 0
            yield from self._emit(stream.push([sound]))
        yield from self._emit(stream.finish())

    def _emit(self, pieces: Iterator[SpeechPiece]) -> Iterator[AudioChunk]:
        while True:
            with self.context.phase("vocode"):
                piece = next(pieces, None)
            if piece is None:
                return
            start_s = sum(map(len, self.samples)) / SAMPLE_RATE
            told = self._told
            self._told += len(piece.codes)
            codes = tuple(self.codes[told : self._told])
            yield AudioChunk(piece.samples, SAMPLE_RATE, start_s, codes)
