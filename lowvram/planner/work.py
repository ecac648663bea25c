"""What the phases pass through memory, bus, disk and arithmetic. No torch."""

from __future__ import annotations

from lowvram.config import DecoderConfig
from lowvram.engine.pieces import passes
from lowvram.planner.model import PartSizes
from lowvram.planner.phases import Home, Request
from lowvram.planner.seconds import EXPECTED_CODES, EXPECTED_TOKENS, UNPACKING_BYTES, Work
from lowvram.planner.streaming import Cut, Source
from lowvram.tensors import Part

HALVES = 2
"""How much slower than 16 bits fp32 is computed."""


def expected_tokens(request: Request) -> int:
    """Of the reply, for which times are predicted."""
    return min(request.settings.tokens, EXPECTED_TOKENS)


def expected_codes(request: Request) -> int:
    """Of its speech."""
    return min(request.settings.codes, EXPECTED_CODES)


def think_works(request: Request, kv: Home, chunk: int, streams: bool) -> list[Work]:
    """Of prefill and decode, besides what streaming adds to each pass."""
    steps = expected_tokens(request)
    return [
        _prompt_work(request, "text", request.shape.tokens, kv, chunk, streams),
        _steps_work(request, "text", request.shape.tokens, steps, kv),
    ]


def talk_work(request: Request, kv: Home, chunk: int, streams: bool) -> Work:
    """Of the Talker's prompt and all codes, besides what streaming adds to each pass."""
    tokens, codes = request.talker_tokens, expected_codes(request)
    prompt = _prompt_work(request, "talker", tokens, kv, chunk, streams)
    return prompt + _steps_work(request, "talker", tokens, codes, kv)


def stream_work(request: Request, cut: Cut, passes: int, source: Source) -> Work:
    """What streams in `passes` passes: pinned bytes cross the bus, the others come from the file
    as well; packed weights whose product is only for those that stay are unpacked instead."""
    moved = passes * cut.moved
    changes = request.unpacks_streamed and not request.unpacks
    unpacked = passes * cut.packed * UNPACKING_BYTES if changes else 0
    return Work(
        memory=unpacked,
        bus=0 if source == "file" else moved,
        disk=0 if source == "pinned" else moved,
    )


def vision_work(request: Request) -> Work:
    patches = sum(time * height * width for time, height, width in request.shape.grids)
    pairs = sum(time for time, _, _ in request.shape.grids)
    total = request.sizes["visual"].total
    return Work(memory=pairs * total, compute=2 * patches * total / request.itemsize)


def audio_work(request: Request) -> Work:
    window = 2 * request.model.config.thinker.audio.n_window
    frames = sum(request.shape.audio_frames)
    total = request.sizes["audio"].total
    return Work(memory=-(-frames // window) * total, compute=frames * total / request.itemsize)


def vocode_work(request: Request) -> Work:
    """The DiT reads its weights once an evaluation; the vocoder's share is about a tenth of it."""
    settings, dit = request.pieces, request.model.config.dit
    assert dit is not None
    steps = passes(settings, expected_codes(request), dit)
    pieces = [one for one in steps if one.stage == "mel"]
    frames = sum(one.length for one in pieces) * dit.repeats
    weights = request.sizes["token2wav"].total
    slower = HALVES if request.dit_itemsize == 4 else 1
    evaluations = settings.evaluations
    return Work(
        memory=len(pieces) * evaluations * weights,
        compute=slower * 2 * 2 * frames * evaluations * weights / request.dit_itemsize,
    )


def _prompt_work(
    request: Request, part: Part, tokens: int, kv: Home, chunk: int, streams: bool
) -> Work:
    sizes, decoder = request.sizes[part], request.decoder(part)
    chunks = -(-tokens // chunk)
    layers = decoder.num_hidden_layers
    queries = decoder.num_attention_heads * decoder.head_dim
    cache = tokens * request.kv_layer_bytes(part) * layers // request.kv_tokens(part)
    states = tokens * decoder.hidden_size * request.itemsize
    converted = sizes.packed * UNPACKING_BYTES + _widened(request, sizes)
    by_layers = (streams or kv == "host") and not request.host_is_device
    return Work(
        memory=chunks * (sizes.total + converted + cache / 2),
        # Layer by layer, the states go to the host after each layer and come back.
        bus=(2 * layers * states if by_layers else 0) + (cache if kv == "host" else 0),
        compute=2 * tokens * _weights(decoder) + 2 * tokens * tokens * queries * layers,
    )


def _steps_work(request: Request, part: Part, tokens: int, steps: int, kv: Home) -> Work:
    sizes, decoder = request.sizes[part], request.decoder(part)
    seen = (tokens + steps / 2) / request.kv_tokens(part)
    cache = seen * request.kv_layer_bytes(part) * decoder.num_hidden_layers
    # Rounded, they are made wide and read again.
    wide = seen * request.kv_wide_bytes(part) * decoder.num_hidden_layers
    unpacked = sizes.packed * UNPACKING_BYTES if request.unpacks else 0
    unpacked += _widened(request, sizes) if request.widens else 0
    return Work(
        memory=steps * (sizes.total + unpacked + cache + 2 * wide),
        bus=steps * cache if kv == "host" else 0,
        compute=steps * 2 * _weights(decoder),
    )


def _widened(request: Request, sizes: PartSizes) -> int:
    """Through memory where 8-bit weights become those of the activations: written and read."""
    return 2 * sizes.rounded * request.itemsize


def _weights(decoder: DecoderConfig) -> int:
    """Multiplications for one token: the weights of all layers."""
    heads = decoder.num_attention_heads + decoder.num_key_value_heads
    attention = 2 * heads * decoder.head_dim * decoder.hidden_size
    mlp = 3 * decoder.hidden_size * decoder.intermediate_size
    return decoder.num_hidden_layers * (attention + mlp)
