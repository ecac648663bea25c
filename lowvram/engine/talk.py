"""The Talker: codec tokens, 50 to a second of speech, from the Thinker's states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowvram.checkpoint import GenerationDefaults
from lowvram.config import TalkerConfig
from lowvram.engine.context import Context
from lowvram.engine.encode import embed_tokens
from lowvram.engine.host_kv import HostKVCache
from lowvram.engine.inputs import Parts, Readback, StepInputs
from lowvram.engine.passes import DecoderPasses, Feed
from lowvram.engine.sampling import Sampler
from lowvram.models.kv_cache import KVCache
from lowvram.models.talker import Talker
from lowvram.quant import kernel_phase
from lowvram.settings import SamplingSettings

PART = "talker"


@dataclass(frozen=True)
class Speech:
    """What the Talker needs of the Thinker; all on the host, in the compute type.

    `prompt_states` [T, E] is each prompt token's last hidden state plus its embedding (the
    embedding is left out where a medium stands); `reply_states` [n, E] the same for every reply
    token that was fed back, n >= 1; `positions` int64 [3, T] are the prompt's.
    """

    prompt_states: Tensor
    reply_states: Tensor
    positions: np.ndarray


def codec_sampler(config: TalkerConfig, settings: SamplingSettings, *, seed: int) -> Sampler:
    """Draws codes as the reference does: it never starts again, and its repetition penalty also
    knows the mask, pad and start tokens that stand for the prompt."""
    start = config.tts_codec_start_token_id
    history = (config.tts_codec_mask_token_id, config.tts_codec_pad_token_id, start)
    return Sampler(settings, seed=seed, suppress=[start], history=history)


class TalkLoop:
    """The codes of one reply, driven one reply state at a time.

        loop.begin(first)
        while not loop.ended:
            codes += loop.step(next(replies, None))
        codes += loop.drain()

    The first code is drawn from the prompt, the voice and the first reply state; each later one
    from the code before it plus the next reply state, then the end of text, then padding. Reply
    states [1, E] are each a reply token's last hidden state plus its embedding, on the host or the
    device. Codes never include the one that ends the reply, and are at most `max_codes`.

    Args:
        prompt_states: [T, E] on the host; see `Speech`. Let go of once the prompt has been run.
        positions: int64 [3, T], the prompt's.
        voice_token: starts the voice's turn.
        chunk: tokens of the prompt that are computed at once.
    """

    def __init__(
        self,
        context: Context,
        talker: Talker,
        cache: KVCache | HostKVCache,
        config: TalkerConfig,
        *,
        prompt_states: Tensor,
        positions: np.ndarray,
        voice_token: int,
        sampler: Sampler,
        defaults: GenerationDefaults,
        max_codes: int,
        chunk: int,
    ) -> None:
        self._context, self._talker, self._config = context, talker, config
        self._prompt: Tensor | None = prompt_states
        self._positions = positions
        self._sampler, self._ends = sampler, defaults.codec_end_ids
        self._max_codes = max_codes
        self._text_end, self._padding, self._voice = embed_tokens(
            context,
            [config.tts_text_end_token_id, config.tts_text_pad_token_id, voice_token],
        ).split(1)
        self._reply_over = False
        self._passes = DecoderPasses(context, PART, talker.model, cache, chunk)
        self._next_position = int(positions.max()) + 3
        self._inputs: StepInputs | None = None
        self._code: Tensor | None = None  # the one drawn last, int64 [1] on the device
        self._readback = Readback(context.device)
        self._drawn = 0
        self._ready: list[int] = []  # codes that nobody was told of
        self._over = False  # a code that ends the reply has been seen
        self.ended = False
        """No further step does anything; `drain` may still have codes."""

    @property
    def tensors(self) -> list[Tensor]:
        """What stays from the first code to the last, besides the cache."""
        own = self._inputs.tensors if self._inputs else []
        return [*own, *self._sampler.tensors, self._text_end]

    def begin(self, first: Tensor) -> None:
        """Run the prompt, the voice and the first reply state [1, E], and draw the first code."""
        assert self._prompt is not None
        tail = torch.cat([self._voice, first.to(self._voice)])
        place = np.arange(self._next_position - 2, self._next_position)
        positions = np.concatenate([self._positions, np.tile(place, (3, 1))], axis=1)
        feed = self._feed(self._prompt, tail)
        with self._context.phase("talk"):
            logits = self._talker.logits(self._passes.prefill(feed, positions, None))
            self._inputs = inputs = StepInputs(self._context.device, self._parts(logits))
            self._add_noise(inputs.fill())
            inputs.send()
            self._draw(logits, inputs)
        self._prompt = None

    def step(self, reply: Tensor | None) -> Sequence[int]:
        """Feed the last code and the next reply state [1, E], and draw one more code.

        Args:
            reply: None where there is no further state: the first time the end of text takes its
                place, then padding. After None there can be no state any more.

        Returns:
            Codes that the host has come to know since the last call, in order. On an accelerator
            the code just drawn is not among them: it is asked for while the next step computes.
        """
        if not self.ended:
            assert self._inputs is not None and self._code is not None
            talker, inputs, text = self._talker, self._inputs, self._text(reply)
            with self._context.phase("talk", stepwise=True), kernel_phase("decode"):
                self._send(inputs, text)
                x = talker.project(talker.embed(self._code[None]) + inputs.there["text"])
                self._draw(talker.logits(self._passes.step(x, self._next_position)), inputs)
            self._next_position += 1
        return self._told()

    def drain(self) -> Sequence[int]:
        """All codes that were drawn and of which nobody was told; waits for those under way."""
        self._learn(0)
        return self._told()

    def _told(self) -> Sequence[int]:
        ready, self._ready = self._ready, []
        return ready

    def _parts(self, logits: Tensor) -> Parts:
        clocks = logits.shape[1:] if self._sampler.random else (0,)
        return {
            "text": ((1, 1, self._config.embedding_size), self._context.dtype),
            "noise": (clocks, torch.float32),
        }

    def _send(self, inputs: StepInputs, text: Tensor) -> None:
        """Have the next step's inputs on their way; `text` [1, E] stands beside the code."""
        host = inputs.fill()
        self._add_noise(host)
        at_home = text.device == self._context.host
        if at_home:
            host["text"].copy_(text[None])
        inputs.send()
        if not at_home:
            inputs.there["text"].copy_(text[None])

    def _add_noise(self, host: dict[str, Tensor]) -> None:
        if self._sampler.random:
            self._sampler.make_noise(host["noise"])

    def _draw(self, logits: Tensor, inputs: StepInputs) -> None:
        noise = inputs.there["noise"] if self._sampler.random else None
        self._code = self._sampler.draw(logits, noise)
        self._readback.send(self._code)
        self._drawn += 1
        self.ended = self._drawn == self._max_codes
        self._learn(self._readback.lag)

    def _learn(self, behind: int) -> None:
        """Ask for codes until at most that many are on their way."""
        while len(self._readback) > behind and not self._over:
            code = self._readback.take()
            if code in self._ends:
                self._over = self.ended = True
            else:
                self._ready.append(code)

    def _text(self, reply: Tensor | None) -> Tensor:
        """What stands beside the next code, [1, E]."""
        if reply is not None:
            if self._reply_over:
                raise ValueError("a reply state after the end of the reply")
            return reply
        ended, self._reply_over = self._reply_over, True
        return self._padding if ended else self._text_end

    def _feed(self, prompt: Tensor, tail: Tensor) -> Feed:
        """Inputs from the prompt [T, E] and the `tail` [2, E], which gets the codec's pad and
        start."""
        context, talker, config = self._context, self._talker, self._config
        marks = torch.tensor([[config.tts_codec_pad_token_id, config.tts_codec_start_token_id]])
        last = len(prompt)

        def feed(start: int, stop: int) -> Tensor:
            parts = []
            if start < last:
                parts.append(context.to_device(prompt[None, start : min(stop, last)]))
            if stop > last:
                own = slice(max(start, last) - last, stop - last)
                codec = talker.embed(marks[:, own].to(context.device.torch))
                parts.append(context.to_device(tail[None, own]) + codec)
            x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            parts.clear()  # the projection is made beside the row alone
            return talker.project(x)

        return feed
