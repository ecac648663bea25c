"""The laws of the vocoder: see `laws.py`. All functions return bytes. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowvram.config import BigVGANConfig, DiTConfig
from lowvram.planner.kernels import FLOAT, Kernels
from lowvram.planner.laws import SMALL
from lowvram.settings import EVALUATIONS_PER_STEP

if TYPE_CHECKING:
    from lowvram.engine.pieces import VocodeSettings


def vocode_bytes(
    dit: DiTConfig,
    bigvgan: BigVGANConfig,
    settings: VocodeSettings,
    codes: int,
    voice_frames: int,
    kernels: Kernels,
    *,
    itemsize: int = FLOAT,
    modulated: bool = False,
    ended: bool = True,
) -> int:
    """Speech of `codes` codes, piece by piece, in a voice with a reference of that many frames.

    `itemsize` is that of the DiT's layers. Where `modulated`, the modulations count elsewhere. What
    is made when the speech has `ended` can be left out.
    """
    window, frames = settings.largest_pass(codes, dit, ended=ended)
    times = _times(settings)
    kept = 0 if modulated else _modulation_bytes(dit, settings)
    mel = vocode_kept_bytes(dit, settings, codes, itemsize=itemsize, modulated=True)
    known = _known_frames(dit, settings, codes)
    if settings.exact:
        # With the block that waited.
        window = min(known, window + dit.block_size)
    # What was made before counts until the piece that it is joined to is handed on.
    mel += (window + frames) * dit.mel_dim * FLOAT
    flow = (3 if settings.solver == "euler" else 7) * window * dit.mel_dim * FLOAT
    # A row of one layer at a time, and the weight that makes it.
    moments = [(3 * times + 2 * dit.hidden_size) * dit.hidden_size * FLOAT]
    if window:
        past = _in_pieces(dit, settings, codes)
        moments.append(mel + _dit_bytes(dit, window, known, kernels, itemsize, past) + flow)
        moments.append(mel + _bigvgan_bytes(bigvgan, frames))
    return max(_voice_bytes(dit, voice_frames), kept + max(moments)) + 2 * SMALL


def vocode_kept_bytes(
    dit: DiTConfig,
    settings: VocodeSettings,
    codes: int,
    *,
    itemsize: int = FLOAT,
    modulated: bool = False,
) -> int:
    """What is there between two pieces of speech of `codes` codes."""
    window, frames = settings.largest_pass(codes, dit)
    pieces = _in_pieces(dit, settings, codes)
    past = _past_bytes(dit, settings.evaluations, itemsize) if pieces else 0
    mel = (window + frames) * dit.mel_dim * FLOAT
    if settings.exact:
        past += _held_bytes(dit, settings.evaluations, itemsize)
        states = EVALUATIONS_PER_STEP[settings.solver] * _known_frames(dit, settings, codes)
        mel += states * dit.mel_dim * FLOAT
    return (0 if modulated else _modulation_bytes(dit, settings)) + past + mel


def _in_pieces(config: DiTConfig, settings: VocodeSettings, codes: int) -> bool:
    """Whether speech of that many codes has a piece that follows another."""
    first = settings.piece_blocks(0) * config.codes_per_block + max(1, settings.ahead(config))
    return settings.exact or codes >= first


def _known_frames(config: DiTConfig, settings: VocodeSettings, codes: int) -> int:
    """Mel frames that a pass of the DiT embeds the codes of: exactly, all that are on their way."""
    window, _ = settings.largest_pass(codes, config)
    return min(codes * config.repeats, window + settings.behind(config) * config.block_size)


def _times(settings: VocodeSettings) -> int:
    """As many as `field_times` of models/ode.py: neighbouring steps of rk4 share a time."""
    steps = settings.time_points - 1
    return steps if settings.solver == "euler" else 3 * steps + 1


def _modulation_bytes(config: DiTConfig, settings: VocodeSettings) -> int:
    """Shifts, scales and gates of every layer at every time, kept while an utterance lasts."""
    return _times(settings) * (6 * config.num_hidden_layers + 2) * config.hidden_size * FLOAT


def _past_bytes(config: DiTConfig, evaluations: int, itemsize: int) -> int:
    """Keys and values of a block, for both branches, of every layer that looks back."""
    values = config.block_size * config.num_attention_heads * config.head_dim
    return evaluations * len(config.look_backward_layers) * 2 * 2 * values * itemsize


def _held_bytes(config: DiTConfig, evaluations: int, itemsize: int) -> int:
    """A block of what every layer that looks ahead takes in, for both branches."""
    values = config.block_size * config.hidden_size
    return evaluations * len(config.look_ahead_layers) * 2 * values * itemsize


def _voice_bytes(config: DiTConfig, frames: int) -> int:
    """The speaker encoder over a voice's reference recording and over silence: its last product,
    whose input is padded by a copy."""
    channels = config.enc_channels
    last = channels[-1]
    pooling = 7 * last + sum(channels[:-1]) + config.enc_attention_channels
    joined = 2 * last + sum(channels[:-1]) + 2 * sum(channels[1:-1])
    first = 8 * max(channels[:-1], default=last)
    values = max(pooling, joined, first) + 2 * config.mel_dim
    return 2 * frames * values * FLOAT + 12 * last * FLOAT


def _dit_bytes(
    config: DiTConfig, frames: int, known: int, kernels: Kernels, itemsize: int, past: bool
) -> int:
    """One velocity evaluation (both guidance branches) over `frames` of the `known` mel
    frames that the codes are embedded for; after a `past`, if there is one."""
    width = config.hidden_size
    heads, dim = config.num_attention_heads, config.head_dim
    inner, attended = config.ff_mult * width, heads * dim
    block = min(config.block_size, frames)
    later = frames - block
    # Blocks that look at a neighbour read overlapping windows of keys and values, which are copies.
    seen = 2 if config.look_backward_layers or config.look_ahead_layers else 1
    windows = later * (1 + 2 * seen) * attended + block * attended if later else 0
    # Those that do not are views, unless a shorter one ends the row.
    whole = frames // block
    alike = 3 * whole * block * attended if frames % block and whole > 1 else 0

    def output(blocks: int, keys: int) -> int:
        rows = 2 * blocks * heads
        return kernels.attention_bytes(block, keys, rows, rows, dim, itemsize) // itemsize

    # The layers that look back join the past's block to their keys and values, so that every whole
    # block sees as many. Queries of a part of the row are copies.
    joined = 4 * (frames + block) * attended
    looking = 2 * (4 + bool(frames % block)) * whole * block * attended if whole > 1 else 0
    looking += 2 * frames * attended + output(max(1, whole), 2 * block)
    behind = joined + max(4 * frames * attended, looking)

    layer = max(
        2 * frames * 2 * width + (behind if past and config.look_backward_layers else 0),
        2 * frames * (2 * width + 3 * attended)
        + max(
            2 * windows + output(max(1, later // block), seen * block),
            2 * alike + output(whole, block),
        ),
        2 * frames * (3 * width + 4 * attended),
        2 * frames * (2 * width + 2 * inner),
        2 * frames * (3 * width),
    )
    kept = known * (width // config.repeats + config.head_dim)
    if itemsize == FLOAT:
        return (layer + kept) * FLOAT
    # The way in and the last norm are in fp32, beside what the layers take or give.
    ends = max(5 * frames * width * FLOAT, 2 * frames * width * (itemsize + 2 * FLOAT))
    rows = 6 * config.num_hidden_layers * width
    return max((layer + rows) * itemsize, ends) + kept * FLOAT


def _bigvgan_bytes(config: BigVGANConfig, frames: int) -> int:
    """`frames` mel frames through the vocoder, fp32: around one anti-aliased activation, the
    stage's input, the running sum, the block's input and the signal, twice at double rate."""
    peak, channels, length = 0, config.upsample_initial_channel, frames
    for rate in config.upsample_rates:
        peak = max(peak, channels * length + channels // 2 * length * rate)
        channels //= 2
        length *= rate
        peak = max(peak, channels * (8 * length + 40))
    entry = frames * (4 * config.mel_dim + config.upsample_initial_channel)
    return max(peak, entry) * FLOAT


def native_bytes(config: BigVGANConfig) -> int:
    """What the CPU's convolutions take besides their tensors, by the process's data segment: the
    weights of a transposed one in an order of its own (49.6 to 53.2 MiB for the 49.5 MiB of the
    7B's first), and as much again that oneDNN keeps for the next (about 55 MiB)."""
    channels, largest = config.upsample_initial_channel, 0
    for kernel in config.upsample_kernel_sizes:
        largest = max(largest, channels * (channels // 2) * kernel * FLOAT)
        channels //= 2
    return 2 * largest + largest // 8
