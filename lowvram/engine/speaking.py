"""The reply's speech: which of the Talker's and the vocoder's steps runs when.

The plan decides, by which phases share a row: a Talker's step as soon as its reply state is there
(`decode` and `talk` in one row) or after the text is complete; the vocoder as soon as its codes are
there (`talk` and `vocode` in one row) or after the last code. Codes follow from the states alone
and pieces of sound from the codes alone, so every order gives the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lowvram.checkpoint import Checkpoint
from lowvram.engine.context import Context
from lowvram.engine.holder import Holder
from lowvram.engine.ladder import Ladder
from lowvram.engine.pieces import VocodeSettings
from lowvram.engine.roundoff import judged_talker, judged_vocoder
from lowvram.engine.talk import TalkLoop, codec_sampler
from lowvram.engine.vocode import NoiseSource, SpeechPiece, SpeechStream
from lowvram.engine.voice import Voice
from lowvram.models.talker import Talker
from lowvram.models.token2wav import Token2Wav
from lowvram.settings import GenerationSettings


@dataclass(frozen=True)
class SpeechSeeds:
    """What codes and noise are drawn from."""

    codes: int
    noise: int


class Speaking(Holder):
    """The speech of one reply; what it holds on the device goes when it is left.

        with Speaking(...) as speaking:
            speaking.prompt(states)
            for state in reply: yield from speaking.hear(state)
            yield from speaking.finish()

    `codes` takes those that are drawn. A reply without states has no sound.

    Args:
        positions: int64 [3, T] of the prompt.
        voice, settings, seeds: of the request.
    """

    def __init__(
        self,
        context: Context,
        checkpoint: Checkpoint,
        positions: np.ndarray,
        voice: Voice,
        settings: GenerationSettings,
        seeds: SpeechSeeds,
        codes: list[int],
    ) -> None:
        super().__init__(context)
        self._checkpoint = checkpoint
        self._positions, self._voice = positions, voice
        self._settings, self._seeds = settings, seeds
        self._talks_early = context.plan.interleaves("decode", "talk")
        self._vocodes_early = context.plan.interleaves("talk", "vocode")
        self._talker = self._stack.enter_context(ExitStack())
        self._prompt: Tensor | None = None
        self._waiting: list[Tensor] = []
        self._loop: TalkLoop | None = None
        self._stream: SpeechStream | None = None
        self._sounded = 0
        self._over = False
        self.codes = codes

    def _forget(self) -> None:
        self._loop = self._stream = self._prompt = None
        self._context.let_go("states")

    def prompt(self, states: Tensor) -> None:
        """The prompt's states [T, E], on the host; see `Thinking`."""
        self._prompt = states
        self._context.carry("states", states)

    def hear(self, state: Tensor) -> Iterator[SpeechPiece]:
        """The next state of the reply [1, E]; what can be said by then, as it is read."""
        if self.settled:
            return
        if self._talks_early:
            yield from self._say(state)
        else:
            assert self._prompt is not None
            self._waiting.append(state)
            self._context.carry("states", self._prompt, *self._waiting)

    def finish(self) -> Iterator[SpeechPiece]:
        """The reply is complete; what remains to be said, as it is read."""
        self._waiting.reverse()
        while self._waiting:
            yield from self._say(self._waiting.pop())
        while self._loop is not None:
            yield from self._say(None)

    @property
    def settled(self) -> bool:
        """Whether no further state of the reply changes what is said: each code hears one."""
        return self._over or len(self._waiting) == self._settings.codes

    def _say(self, state: Tensor | None) -> Iterator[SpeechPiece]:
        """What can be said after one more state, or the end of the text; after the last code all
        that remains, whatever the Thinker still writes."""
        if self._loop is None:
            assert state is not None
            self._loop = self._open_talker(state)
            self._prompt = None
            if self._talks_early:
                self._context.let_go("states")
            codes = self._loop.drain()
        else:
            codes = self._loop.step(state)
        yield from self._sound(self._drawn(codes))
        if self._loop.ended:
            yield from self._end()

    def _end(self) -> Iterator[SpeechPiece]:
        """No code comes any more; what remains to be said."""
        assert self._loop is not None
        yield from self._sound(self._drawn(self._loop.drain()))
        self._loop, self._over = None, True
        self._waiting.clear()
        self._let_go("talk")
        self._talker.close()
        self._context.let_go("states")
        if self._stream is None:
            with self._context.phase("vocode"):
                self._stream = self._open_stream()
            yield from self._sound(self.codes)
        yield from self._pieces(self._stream.finish())
        self._stream = None
        self._let_go("speech")
        self._stack.close()

    def _drawn(self, codes: Sequence[int]) -> Sequence[int]:
        self.codes.extend(codes)
        return codes

    def _sound(self, codes: Sequence[int]) -> Iterator[SpeechPiece]:
        """Pieces that codes make possible, if the vocoder is there; else the codes are kept."""
        if self._stream is None:
            return
        dit = self._checkpoint.config.dit
        assert dit is not None
        for code in codes:
            # Control codes have no sound of their own; the null code keeps their 20 ms.
            sound = code if code <= dit.num_embeds else 0
            yield from self._pieces(self._stream.push([sound]))

    def _pieces(self, pieces: Iterator[SpeechPiece]) -> Iterator[SpeechPiece]:
        stream = self._stream
        assert stream is not None
        while True:
            with self._context.phase("vocode"):
                piece = next(pieces, None)
                self._keep("speech", stream.tensors)
            if piece is None:
                return
            # Control codes are told as they were drawn.
            said = self._sounded
            self._sounded += len(piece.codes)
            yield SpeechPiece(piece.samples, tuple(self.codes[said : self._sounded]))

    def _open_talker(self, first: Tensor) -> TalkLoop:
        """The Talker on the device, and the vocoder beside it where the plan holds both; it has
        heard the prompt and the first state."""
        context, config = self._context, self._checkpoint.config.talker
        assert config is not None and self._prompt is not None
        tokens = len(self._prompt) + 2 + self._settings.codes
        with context.phase("talk"):
            if self._vocodes_early:
                self._stream = self._open_stream()
            model = self._talker.enter_context(context.use("talker", Talker))
            cache = self._talker.enter_context(
                context.kv_cache("talker", "talker", config.decoder, tokens)
            )
        loop = TalkLoop(
            context,
            model,
            cache,
            config,
            prompt_states=self._prompt,
            positions=self._positions,
            voice_token=self._voice.bos_token,
            sampler=codec_sampler(config, self._settings.talker_sampling, seed=self._seeds.codes),
            defaults=self._checkpoint.generation,
            max_codes=self._settings.codes,
            chunk=context.plan.chunks["talker"],
        )
        with judged_talker(context, model):
            loop.begin(first)
        self._keep("talk", loop.tensors)
        return loop

    def _open_stream(self) -> SpeechStream:
        context = self._context
        token2wav = self._stack.enter_context(context.use("token2wav", Token2Wav))
        self._stack.enter_context(judged_vocoder(context, token2wav))
        settings = VocodeSettings.of_request(self._settings)
        dit = token2wav.code2wav_dit_model.config
        noise = NoiseSource(self._seeds.noise, dit.mel_dim, dit.repeats)
        stream = SpeechStream(token2wav, self._voice, noise, settings, context.constants)
        Ladder(context, "token2wav").climb(stream.prepare)
        # They stay for the next request.
        context.carry("constants", *context.constants.tensors)
        return stream
