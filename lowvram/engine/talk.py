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
from lowvram.engine.sampling import Sampler
from lowvram.models.kv_cache import KVCache
from lowvram.models.talker import Talker
from lowvram.planner.laws import PREFILL_CHUNK
from lowvram.quant import kernel_phase
from lowvram.settings import SamplingSettings


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
    cache: KVCache,
    config: TalkerConfig,
    speech: Speech,
    *,
    voice_token: int,
    sampler: Sampler,
    defaults: GenerationDefaults,
    max_codes: int,
) -> Iterator[int]:
    """Codes of the reply, without the one that ends it. `voice_token` starts the voice's turn.

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
    with context.phase("talk"), kernel_phase("prefill"):
        logits, filled = _prefill(context, talker, cache, config, prompt, place)
    for spoken in range(1, max_codes + 1):
        code = sampler(logits)
        if code in defaults.codec_end_ids:
            return
        yield code
        if spoken == max_codes:
            return
        with context.phase("talk", stepwise=True), kernel_phase("decode"):
            x = talker.embed(torch.tensor([[code]], device=context.device.torch))
            x = x + context.to_device(next(replies, pad))[None]
            hidden = _forward(talker, cache, x, torch.full((3, 1, 1), position), filled)
            logits = talker.logits(hidden[:, -1])
        filled += 1
        position += 1


def _prefill(
    context: Context,
    talker: Talker,
    cache: KVCache,
    config: TalkerConfig,
    prompt: torch.Tensor,
    positions: np.ndarray,
) -> tuple[torch.Tensor, int]:
    """Logits after the prompt [T, E] (whose last two rows get the codec's pad and start), and T."""
    marks = torch.tensor([[config.tts_codec_pad_token_id, config.tts_codec_start_token_id]])
    place = torch.from_numpy(positions)[:, None]
    last = len(prompt) - 2
    for start in range(0, len(prompt), PREFILL_CHUNK):
        x = context.to_device(prompt[None, start : start + PREFILL_CHUNK])
        stop = start + x.shape[1]
        marked = range(max(start, last), stop)
        if marked:
            codec = talker.embed(marks.to(x.device))[:, marked.start - last :][:, : len(marked)]
            x = torch.cat(
                [x[:, : marked.start - start], x[:, marked.start - start :] + codec], dim=1
            )
        hidden = _forward(talker, cache, x, place[..., start:stop], start)
    return talker.logits(hidden[:, -1]), len(prompt)


def _forward(
    talker: Talker, cache: KVCache, x: torch.Tensor, positions: torch.Tensor, filled: int
) -> torch.Tensor:
    rope = talker.rope(positions, x.dtype)
    hidden: torch.Tensor = talker(x, rope, cache, filled)
    return hidden
