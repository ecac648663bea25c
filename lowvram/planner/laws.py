"""How many bytes each phase holds besides weights: laws over shapes, as upper bounds.

Each law names the moments of a computation and adds up the tensors that are alive at each, as the
engine's own code makes them; the largest moment counts. A test runs that code on the `meta` device
at many shapes and holds the meter's peak against the laws.
All functions return bytes; `itemsize` is that of the activations. No torch.
"""

from __future__ import annotations

from dataclasses import replace

from lowvram.config import AudioConfig, DecoderConfig, TalkerConfig, VisionConfig
from lowvram.models.kv_rows import row_bytes
from lowvram.planner.kernels import FLOAT, Kernels

CHUNKS = (512, 256, 128, 64)
"""Prompt tokens that may go through a layer at once."""

CODE_DRAWING = 27
"""Bytes for each codec token that the Talker's loop keeps to draw the next one: see `_Buffers` of
`engine/sampling.py`, and the noise."""

SMALL = 2 * 1024
"""Vectors and scalars that no law counts, at most."""


def kv_bytes(decoder: DecoderConfig, tokens: int, itemsize: int) -> int:
    """Keys and values of `tokens` positions in every layer."""
    return decoder.num_hidden_layers * kv_layer_bytes(decoder, tokens, itemsize)


def kv_layer_bytes(decoder: DecoderConfig, tokens: int, itemsize: int) -> int:
    """Keys and values of `tokens` positions in one layer."""
    return 2 * tokens * decoder.num_key_value_heads * decoder.head_dim * itemsize


def rounded_kv_layer_bytes(decoder: DecoderConfig, tokens: int, itemsize: int) -> int:
    """The same where they are rounded to 8 bits, with scales of `itemsize`."""
    return 2 * tokens * decoder.num_key_value_heads * row_bytes(decoder.head_dim, itemsize)


def states_bytes(width: int, tokens: int, itemsize: int) -> int:
    """One row of `width` for each of `tokens`: prompt embeddings, or hidden states."""
    return width * tokens * itemsize


def rope_bytes(decoder: DecoderConfig, tokens: int, itemsize: int) -> int:
    """Cosines and sines of `tokens` positions."""
    return 2 * tokens * decoder.head_dim * itemsize


def tables_bytes(decoder: DecoderConfig, tokens: int, itemsize: int) -> int:
    """What making the tables of `rope_bytes` takes besides them, where they are made: in fp32."""
    return 18 * tokens * decoder.head_dim - rope_bytes(decoder, tokens, itemsize) + SMALL


def vision_bytes(config: VisionConfig, patches: int, itemsize: int, kernels: Kernels) -> int:
    """One frame pair of `patches` patches through the tower."""
    width, inner = config.hidden_size * itemsize, config.intermediate_size * itemsize
    heads, dim = config.num_heads, config.hidden_size // config.num_heads
    norm = kernels.norm_bytes(config.hidden_size, itemsize)
    entry = config.patch_values * itemsize
    # Cosines, sines and what they turn are fp32.
    turning = 5 * width + 2 * config.hidden_size * FLOAT
    mixing = 4 * width + max(2 * width, width + width)
    merged = config.out_hidden_size * itemsize // config.spatial_merge_size**2
    layer = max(
        2 * width,
        2 * width + norm,
        turning,
        mixing + width,
        3 * width + 2 * inner,
        4 * width + inner,
        4 * width,
        3 * width + 2 * merged,
    )
    attended = kernels.attention_bytes(patches, patches, heads, heads, dim, itemsize)
    own = patches * (5 * width) + attended
    return max(patches * layer, own) + patches * (entry + 2 * dim * FLOAT) + SMALL


def audio_bytes(config: AudioConfig, frames: int, itemsize: int, kernels: Kernels) -> int:
    """A window of `frames` mel frames through the tower."""
    width, inner = config.d_model * itemsize, config.encoder_ffn_dim * itemsize
    heads, dim = config.encoder_attention_heads, config.d_model // config.encoder_attention_heads
    steps = (frames + 1) // 2
    mel = frames * config.num_mel_bins * itemsize
    attended = kernels.attention_bytes(steps, steps, heads, heads, dim, itemsize)
    layer = max(
        steps * 6 * width + attended,
        steps * 7 * width,
        steps * (2 * width + 2 * inner),
        steps * (4 * width + config.output_dim * itemsize) // 2,
    )
    return mel + max(2 * frames * width, layer) + SMALL


def layer_bytes(
    config: DecoderConfig, rows: int, keys: int, itemsize: int, kernels: Kernels
) -> int:
    """`rows` tokens through one decoder layer that sees `keys` tokens: its input, the rotary
    tables, and what it makes."""
    width, inner = config.hidden_size * itemsize, config.intermediate_size * itemsize
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    queries, kv = heads * dim * itemsize, kv_heads * dim * itemsize
    norm = kernels.norm_bytes(config.hidden_size, itemsize)
    attended = kernels.attention_bytes(rows, keys, heads, kv_heads, dim, itemsize)
    moments = (
        rows * (2 * width + norm),
        # Queries are turned, then keys; or both as one, where their linears are joined.
        rows * (2 * width + max(4 * queries + 2 * kv, 2 * queries + 5 * kv)),
        rows * (2 * width + 4 * queries + 5 * kv) * kernels.joins,
        rows * (2 * width + queries + 2 * kv) + attended,
        rows * (3 * width + 2 * queries + 2 * kv),
        rows * (3 * width + 2 * inner),
        rows * (4 * width + (2 if kernels.joins else 1) * inner),
    )
    return max(moments) + rope_bytes(config, rows, itemsize)


def logits_bytes(config: DecoderConfig, itemsize: int, by_layers: bool) -> int:
    """Logits of one position: of the pieces of the head, joined, and in fp32. Where units come one
    by one their pieces are still there at the end."""
    wide = FLOAT if itemsize < FLOAT else 0
    pieces = itemsize if by_layers else 0
    return config.vocab_size * max(2 * itemsize, pieces + itemsize + wide)


def prefill_bytes(
    config: DecoderConfig,
    tokens: int,
    itemsize: int,
    chunk: int,
    kernels: Kernels,
    *,
    by_layers: bool = False,
) -> int:
    """A prompt of `tokens` tokens through a decoder, `chunk` of them at a time, and the logits of
    the last. `by_layers`: each layer with all chunks, not each chunk with all layers."""
    rows = min(tokens, chunk)
    width = config.hidden_size * itemsize
    # Beside the layer's input: the chunk's embeddings, and the states of the chunk before.
    waiting = rows * width * (int(not by_layers) + int(tokens > chunk))
    layer = waiting + layer_bytes(config, rows, tokens, itemsize, kernels)
    return max(layer, rows * width + logits_bytes(config, itemsize, by_layers)) + SMALL


def drawing_bytes(config: DecoderConfig, kernels: Kernels) -> int:
    """Drawing a token: what the sampler makes, and logits that wait from before."""
    return (kernels.sampling + kernels.waiting * FLOAT) * config.vocab_size + SMALL


def decode_bytes(
    config: DecoderConfig,
    context: int,
    itemsize: int,
    kernels: Kernels,
    *,
    by_layers: bool = False,
) -> int:
    """One token through a decoder that has seen `context`, its logits, and drawing the next."""
    width = config.hidden_size * itemsize
    step = max(
        width + layer_bytes(config, 1, context, itemsize, kernels),
        width + logits_bytes(config, itemsize, by_layers),
    )
    waiting = kernels.waiting * config.vocab_size * FLOAT
    return max(step + waiting + SMALL, drawing_bytes(config, kernels))


def waiting_bytes(config: DecoderConfig, kernels: Kernels) -> int:
    """Between two steps of a decoder: logits to draw from, and those that wait from before."""
    return (1 + kernels.waiting) * config.vocab_size * FLOAT


def talk_bytes(
    config: TalkerConfig,
    tokens: int,
    itemsize: int,
    chunk: int,
    kernels: Kernels,
    *,
    by_layers: bool = False,
) -> int:
    """A prompt of `tokens` through the Talker, whose inputs are as wide as the Thinker's states,
    and then a code at a time."""
    rows = min(tokens, chunk)
    wide = config.embedding_size * itemsize
    narrow = config.decoder.hidden_size * itemsize
    before = rows * narrow if tokens > chunk else 0
    entry = before + rows * max(2 * wide, wide + narrow) + 4 * wide + SMALL
    prefill = prefill_bytes(config.decoder, tokens, itemsize, chunk, kernels, by_layers=by_layers)
    step = talk_step_bytes(config, tokens, itemsize, kernels, by_layers=by_layers)
    return max(max(entry, prefill) + talk_kept_bytes(config, itemsize), step)


def talk_step_bytes(
    config: TalkerConfig,
    tokens: int,
    itemsize: int,
    kernels: Kernels,
    *,
    by_layers: bool = False,
) -> int:
    """A code through the Talker, and drawing the next where the logits are."""
    step = decode_bytes(
        config.decoder, tokens, itemsize, replace(kernels, sampling=0), by_layers=by_layers
    )
    return step + talk_kept_bytes(config, itemsize)


def talk_kept_bytes(config: TalkerConfig, itemsize: int) -> int:
    """Buffers of the Talker's loop, which are there from its prompt on."""
    widths = 3 * config.embedding_size + config.decoder.hidden_size
    return CODE_DRAWING * config.decoder.vocab_size + widths * itemsize
