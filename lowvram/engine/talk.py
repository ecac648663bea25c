"""The Talker: codec tokens, 50 to a second of speech, from the Thinker's states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lowvram.checkpoint import GenerationDefaults
from lowvram.config import TalkerConfig
from lowvram.engine.context import Context
from lowvram.engine.encode import embed_tokens
from lowvram.engine.host_kv import HostKVCache
from lowvram.engine.passes import DecoderPasses, Feed
from lowvram.engine.sampling import Sampler
from lowvram.models.kv_cache import KVCache
from lowvram.models.talker import Talker
from lowvram.settings import SamplingSettings

PART = "talker"


@dataclass(frozen=True)
class Speech:
    """What the Talker needs of the Thinker; all on the host, in the compute type.

    `prompt_states` [T, E] is each prompt token's last hidden state plus its embedding (the
    embedding is left out where a medium stands); `reply_states` [n, E] the same for every reply
    token that was fed back, n >= 1; `positions` int64 [3, T] are the prompt's.
    """

    prompt_states: torch.Tensor
    reply_states: torch.Tensor
    positions: np.ndarray


def codec_sampler(config: TalkerConfig, settings: SamplingSettings, *, seed: int) -> Sampler:
    """Draws codes as the reference does: it never starts again, and its repetition penalty also
    knows the mask, pad and start tokens that stand for the prompt."""
    start = config.tts_codec_start_token_id
    history = (config.tts_codec_mask_token_id, config.tts_codec_pad_token_id, start)
    return Sampler(settings, seed=seed, suppress=[start], history=history)


def talk(
    context: Context,
    talker: Talker,
    cache: KVCache | HostKVCache,
    config: TalkerConfig,
    speech: Speech,
    *,
    voice_token: int,
    sampler: Sampler,
    defaults: GenerationDefaults,
    max_codes: int,
    chunk: int,
) -> Iterator[int]:
    """Codes of the reply, without the one that ends it. `voice_token` starts the voice's turn;
    `chunk` tokens of the prompt are computed at once.

    The first step sees the prompt, the voice and the first reply state; each later step sees the
    code before it plus the next reply state, then the end of text, then padding.
    """
    end, pad, voice = embed_tokens(
        context,
        [config.tts_text_end_token_id, config.tts_text_pad_token_id, voice_token],
    ).split(1)
    replies = iter([*speech.reply_states.split(1)[1:], end])
    prompt = torch.cat([speech.prompt_states, voice, speech.reply_states[:1]])
    position = int(speech.positions.max()) + 1
    place = np.concatenate(
        [speech.positions, np.tile(np.arange(position, position + 2), (3, 1))], axis=1
    )
    position += 2
    passes = DecoderPasses(context, PART, talker.model, cache, chunk)
    feed = _feed(context, talker, config, prompt)
    with context.phase("talk"):
        logits = talker.logits(passes.prefill(feed, place, None))
    for spoken in range(1, max_codes + 1):
        code = sampler(logits)
        if code in defaults.codec_end_ids:
            return
        yield code
        if spoken == max_codes:
            return
        with context.phase("talk", stepwise=True):
            x = talker.embed(torch.tensor([[code]], device=context.device.torch))
            x = talker.project(x + context.to_device(next(replies, pad))[None])
            logits = talker.logits(passes.step(x, position))
        position += 1


def _feed(context: Context, talker: Talker, config: TalkerConfig, prompt: torch.Tensor) -> Feed:
    """Inputs from the prompt [T, E] on the host, whose last two rows get the codec's pad and
    start."""
    marks = torch.tensor([[config.tts_codec_pad_token_id, config.tts_codec_start_token_id]])
    last = len(prompt) - 2

    def feed(start: int, stop: int) -> torch.Tensor:
        x = context.to_device(prompt[None, start:stop])
        marked = range(max(start, last), stop)
        if marked:
            codec = talker.embed(marks.to(x.device))[:, marked.start - last :][:, : len(marked)]
            plain = marked.start - start
            x = torch.cat([x[:, :plain], x[:, plain:] + codec], dim=1)
        return talker.project(x)

    return feed
