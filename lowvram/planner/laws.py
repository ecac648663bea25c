"""How many bytes each phase holds besides weights: laws over shapes, as upper bounds.

The coefficients count the tensors that are alive at once in the engine's own code; a test runs
that code on the `meta` device at many shapes and holds the meter's peak against them.
All functions return bytes. No torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowvram.config import (
    AudioConfig,
    BigVGANConfig,
    DecoderConfig,
    DiTConfig,
    TalkerConfig,
    VisionConfig,
)

if TYPE_CHECKING:
    from lowvram.engine.pieces import VocodeSettings

PREFILL_CHUNK = 512
"""Prompt tokens that go through all layers at once. Fixed, so that no budget changes a rounding."""

ATTENTION_BLOCK = 512
"""Keys of one block of the online softmax (`KEY_BLOCK` of `models/attention.py`)."""

FLOAT = 4


def kv_bytes(decoder: DecoderConfig, tokens: int, itemsize: int) -> int:
    """Keys and values of `tokens` positions in every layer."""
    width = decoder.num_key_value_heads * decoder.head_dim
    return 2 * decoder.num_hidden_layers * tokens * width * itemsize


def states_bytes(width: int, tokens: int, itemsize: int) -> int:
    """One row of `width` for each of `tokens`: prompt embeddings, or hidden states."""
    return width * tokens * itemsize


def vision_bytes(config: VisionConfig, patches: int, itemsize: int) -> int:
    """One frame pair of `patches` patches through the tower."""
    width, inner = config.hidden_size, config.intermediate_size
    residual = 2 * width * itemsize
    attention = (4 * width + width) * itemsize + 2 * width * FLOAT
    mlp = (width + 3 * inner) * itemsize + width * FLOAT
    tables = 4 * (width // config.num_heads) * FLOAT
    entry = config.patch_values * (itemsize + FLOAT)
    return patches * (residual + max(attention, mlp, entry) + tables)


def audio_bytes(config: AudioConfig, itemsize: int) -> int:
    """One window of 2 s through the tower."""
    frames, width, inner = 2 * config.n_window, config.d_model, config.encoder_ffn_dim
    entry = frames * (config.num_mel_bins + 3 * width) * itemsize
    tokens = frames // 2
    layer = tokens * (6 * width + 2 * inner) * itemsize + tokens * width * FLOAT
    return max(entry, layer) + tokens * 2 * width * FLOAT


def prefill_bytes(config: DecoderConfig, tokens: int, itemsize: int) -> int:
    """One chunk of a prompt of `tokens` tokens through a decoder, and its last logits."""
    chunk = min(tokens, PREFILL_CHUNK)
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    width, inner = config.hidden_size, config.intermediate_size
    residual = 2 * width * itemsize + 4 * dim * FLOAT
    qkv = (2 * heads + 3 * kv_heads) * dim * itemsize
    block = min(ATTENTION_BLOCK, tokens)
    softmax = heads * (2 * block * FLOAT + 3 * dim * FLOAT)
    norm = width * (itemsize + 2 * FLOAT)
    mlp = 3 * inner * itemsize + width * itemsize
    return chunk * (residual + max(qkv + softmax, norm, mlp)) + config.vocab_size * (
        itemsize + FLOAT
    )


def decode_bytes(config: DecoderConfig, itemsize: int) -> int:
    """One token through a decoder; the sampler's copies of the logits, with the sort's indices,
    are what matters."""
    return config.vocab_size * (itemsize + 8 * FLOAT) + prefill_bytes(config, 1, itemsize)


def talk_bytes(config: TalkerConfig, tokens: int, itemsize: int) -> int:
    """One chunk through the Talker: its inputs are as wide as the Thinker's states."""
    chunk = min(tokens, PREFILL_CHUNK)
    entry = chunk * config.embedding_size * (2 * itemsize + FLOAT)
    return entry + prefill_bytes(config.decoder, tokens, itemsize)


def vocode_bytes(
    dit: DiTConfig,
    bigvgan: BigVGANConfig,
    settings: VocodeSettings,
    codes: int,
    voice_frames: int,
) -> int:
    """Speech of `codes` codes, piece by piece, in a voice with a reference of that many frames."""
    window, frames = settings.largest_pass(codes, dit.repeats)
    kept = _modulation_bytes(dit, settings.evaluations)
    kept += 2 * (window + frames) * dit.mel_dim * FLOAT
    voice = _voice_bytes(dit, voice_frames)
    return kept + max(voice, _dit_bytes(dit, window), _bigvgan_bytes(bigvgan, frames))


def _dit_bytes(config: DiTConfig, frames: int) -> int:
    """One velocity evaluation (both guidance branches, float32) over `frames` mel frames."""
    width = config.hidden_size
    inner = config.ff_mult * width
    layer = max(7 * width + 4 * width, 2 * width + 2 * inner)
    return 2 * frames * (2 * width + layer + config.emb_dim + 4 * config.mel_dim) * FLOAT


def _modulation_bytes(config: DiTConfig, evaluations: int) -> int:
    """Shifts, scales and gates of every layer at every time, kept while an utterance lasts."""
    return evaluations * (6 * config.num_hidden_layers + 2) * config.hidden_size * FLOAT


def _voice_bytes(config: DiTConfig, frames: int) -> int:
    """The speaker encoder over a voice's reference recording and over silence."""
    return 2 * frames * 10 * max(config.enc_channels) * FLOAT


def _bigvgan_bytes(config: BigVGANConfig, frames: int) -> int:
    """`frames` mel frames through the vocoder, float32."""
    peak, channels, length = 0, config.upsample_initial_channel, frames
    for rate in config.upsample_rates:
        channels //= 2
        length *= rate
        # Around one anti-aliased activation: the block's input, the running sum, the padded and
        # doubled signal and its snake; 2 samples for 1 between the two filters.
        peak = max(peak, channels * length * (4 + 2 * 4))
    return peak * FLOAT
