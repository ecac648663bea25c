"""Which tensors a checkpoint must hold: names, shapes, and the part each belongs to.

Names and shapes follow the published Qwen2.5-Omni files, which are also what transformers writes
(the tests compare with its `save_pretrained`). Imports neither torch nor numpy, so that a
checkpoint can be checked, and a plan made, from headers and `config.json` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from lowvram.config import (
    AudioConfig,
    BigVGANConfig,
    DecoderConfig,
    DiTConfig,
    OmniConfig,
    TalkerConfig,
    ThinkerConfig,
    VisionConfig,
)
from lowvram.errors import CheckpointError

Part = Literal["embed", "visual", "audio", "text", "talker", "token2wav"]
PARTS: tuple[Part, ...] = ("embed", "visual", "audio", "text", "talker", "token2wav")
SPEECH_PARTS: tuple[Part, ...] = ("talker", "token2wav")

EMBED_NAME = "thinker.model.embed_tokens.weight"
HEAD_NAME = "thinker.lm_head.weight"

PASSING_NAMES = ("attn_norm.linear.weight", "norm_out.linear.weight")
"""How the names of weights end that no device holds: they pass through it when they are used."""

AWQ_PACK = 8
"""4-bit values in one int32 of a packed tensor."""

Shape = tuple[int, ...]
Tensors = Iterator[tuple[str, Shape]]

_PREFIXES: tuple[tuple[str, Part], ...] = (
    (EMBED_NAME, "embed"),
    ("thinker.visual.", "visual"),
    ("thinker.audio_tower.", "audio"),
    ("thinker.", "text"),
    ("talker.", "talker"),
    ("token2wav.", "token2wav"),
)


def part_of(name: str) -> Part:
    """The part a tensor is loaded with, by its name.

    Raises:
        CheckpointError: a name that no part of Qwen2.5-Omni has.
    """
    for prefix, part in _PREFIXES:
        if name.startswith(prefix):
            return part
    raise CheckpointError(
        f"tensor {name} belongs to no part of Qwen2.5-Omni; wanted a name that begins with "
        "thinker., talker. or token2wav.: is this another model?"
    )


def thinker_linears(config: ThinkerConfig) -> dict[str, tuple[int, int, bool]]:
    """The linears of the text layers, which AWQ packs: name -> (inputs, outputs, has a bias)."""
    return {
        f"thinker.model.layers.{layer}.{name}": dims
        for layer in range(config.text.num_hidden_layers)
        for name, dims in _layer_linears(config.text).items()
    }


def expected_tensors(
    config: OmniConfig, quantized: Callable[[str], bool] = lambda name: False
) -> dict[str, Shape]:
    """Every tensor of a checkpoint and its shape.

    Args:
        config: the checkpoint's shapes; without Talker and vocoder, none of theirs are expected.
        quantized: tells by the name of a text linear (`thinker.model.layers.0.mlp.up_proj`)
            whether it is packed as AWQ (`qweight`, `qzeros`, `scales`) instead of `weight`.

    Raises:
        CheckpointError: a packed linear whose dimensions the packing cannot express.
    """
    group = config.quant.group_size if config.quant else 128
    found = dict(_embed(config.thinker))
    found |= _visual(config.thinker.vision)
    found |= _audio(config.thinker.audio)
    found |= _text(config.thinker, quantized, group)
    if config.talker is not None:
        found |= _talker(config.talker)
    if config.dit is not None:
        found |= _dit(config.dit)
    if config.bigvgan is not None:
        found |= _bigvgan(config.bigvgan)
    return found


_LAYERS: tuple[tuple[str, Part], ...] = (
    ("thinker.model.layers.", "text"),
    ("talker.model.layers.", "talker"),
)


def layer_of(name: str) -> tuple[Part, int] | None:
    """The part and number of the decoder layer that a tensor belongs to; None outside of one."""
    for prefix, part in _LAYERS:
        if name.startswith(prefix):
            return part, int(name[len(prefix) :].partition(".")[0])
    return None


def part_bytes(tensors: Mapping[str, Shape], itemsize: Callable[[str], int]) -> dict[Part, int]:
    """Bytes of each part when the tensor `name` is held at `itemsize(name)` bytes a value."""
    total: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for name, shape in tensors.items():
        total[part_of(name)] += math.prod(shape) * itemsize(name)
    return total


def parameters(tensors: Mapping[str, Shape]) -> int:
    """Values in all tensors together (the parameter count of a 16-bit checkpoint)."""
    return sum(math.prod(shape) for shape in tensors.values())


def is_packed(name: str) -> bool:
    """True of the int32 tensors of a packed linear."""
    return name.endswith((".qweight", ".qzeros"))


def packed_linears(names: Iterable[str]) -> frozenset[str]:
    """The linears that a file holds packed, by the names of its tensors."""
    return frozenset(n.removesuffix(".qweight") for n in names if n.endswith(".qweight"))


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Tensors:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _conv(name: str, inputs: int, outputs: int, kernel: int) -> Tensors:
    yield f"{name}.weight", (outputs, inputs, kernel)
    yield f"{name}.bias", (outputs,)


def _awq(name: str, inputs: int, outputs: int, bias: bool, group: int) -> Tensors:
    if inputs % group or outputs % AWQ_PACK:
        raise CheckpointError(
            f"{name} is packed as AWQ with {inputs} inputs and {outputs} outputs; wanted inputs "
            f"in groups of {group} and outputs in eights: the file was made wrongly"
        )
    yield f"{name}.qweight", (inputs, outputs // AWQ_PACK)
    yield f"{name}.qzeros", (inputs // group, outputs // AWQ_PACK)
    yield f"{name}.scales", (inputs // group, outputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _layer_linears(config: DecoderConfig) -> dict[str, tuple[int, int, bool]]:
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "self_attn.q_proj": (width, queries, True),
        "self_attn.k_proj": (width, keys, True),
        "self_attn.v_proj": (width, keys, True),
        "self_attn.o_proj": (queries, width, False),
        "mlp.gate_proj": (width, inner, False),
        "mlp.up_proj": (width, inner, False),
        "mlp.down_proj": (inner, width, False),
    }


def _decoder(
    name: str, config: DecoderConfig, quantized: Callable[[str], bool], group: int
) -> Tensors:
    for layer in range(config.num_hidden_layers):
        prefix = f"{name}.layers.{layer}"
        for suffix, (inputs, outputs, bias) in _layer_linears(config).items():
            full = f"{prefix}.{suffix}"
            if quantized(full):
                yield from _awq(full, inputs, outputs, bias, group)
            else:
                yield from _linear(full, inputs, outputs, bias)
        yield f"{prefix}.input_layernorm.weight", (config.hidden_size,)
        yield f"{prefix}.post_attention_layernorm.weight", (config.hidden_size,)
    yield f"{name}.norm.weight", (config.hidden_size,)


def _embed(config: ThinkerConfig) -> Tensors:
    yield EMBED_NAME, (config.text.vocab_size, config.text.hidden_size)


def _text(config: ThinkerConfig, quantized: Callable[[str], bool], group: int) -> Tensors:
    yield from _decoder("thinker.model", config.text, quantized, group)
    yield from _linear("thinker.lm_head", config.text.hidden_size, config.text.vocab_size, False)


def _talker(config: TalkerConfig) -> Tensors:
    decoder = config.decoder
    yield from _linear("talker.thinker_to_talker_proj", config.embedding_size, decoder.hidden_size)
    yield "talker.model.embed_tokens.weight", (decoder.vocab_size, config.embedding_size)
    yield from _decoder("talker.model", decoder, lambda name: False, 0)
    yield from _linear("talker.codec_head", decoder.hidden_size, decoder.vocab_size, False)


def _visual(config: VisionConfig) -> Tensors:
    width, inner = config.hidden_size, config.intermediate_size
    patch = (config.temporal_patch_size, config.patch_size, config.patch_size)
    yield "thinker.visual.patch_embed.proj.weight", (width, config.in_channels, *patch)
    for depth in range(config.depth):
        block = f"thinker.visual.blocks.{depth}"
        for name in ("q", "k", "v", "proj"):
            yield from _linear(f"{block}.attn.{name}", width, width)
        yield from _linear(f"{block}.mlp.gate_proj", width, inner)
        yield from _linear(f"{block}.mlp.up_proj", width, inner)
        yield from _linear(f"{block}.mlp.down_proj", inner, width)
        yield f"{block}.norm1.weight", (width,)
        yield f"{block}.norm2.weight", (width,)
    merged = width * config.spatial_merge_size**2
    yield "thinker.visual.merger.ln_q.weight", (width,)
    yield from _linear("thinker.visual.merger.mlp.0", merged, merged)
    yield from _linear("thinker.visual.merger.mlp.2", merged, config.out_hidden_size)


def _audio(config: AudioConfig) -> Tensors:
    width, tower = config.d_model, "thinker.audio_tower"
    yield from _conv(f"{tower}.conv1", config.num_mel_bins, width, 3)
    yield from _conv(f"{tower}.conv2", width, width, 3)
    yield f"{tower}.audio_bos_eos_token.weight", (2, config.output_dim)
    for index in range(config.encoder_layers):
        layer = f"{tower}.layers.{index}"
        for name, bias in (("q_proj", True), ("k_proj", False), ("v_proj", True)):
            yield from _linear(f"{layer}.self_attn.{name}", width, width, bias)
        yield from _linear(f"{layer}.self_attn.out_proj", width, width)
        yield from _linear(f"{layer}.fc1", width, config.encoder_ffn_dim)
        yield from _linear(f"{layer}.fc2", config.encoder_ffn_dim, width)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            yield from _norm_with_bias(f"{layer}.{name}", width)
    yield from _norm_with_bias(f"{tower}.ln_post", width)
    yield from _linear(f"{tower}.proj", width, config.output_dim)


def _norm_with_bias(name: str, width: int) -> Tensors:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _dit(config: DiTConfig) -> Tensors:
    dit, width = "token2wav.code2wav_dit_model", config.hidden_size
    attended = config.num_attention_heads * config.head_dim
    joined = config.mel_dim + config.enc_dim + config.enc_emb_dim + config.emb_dim
    # One row more than there are codes, and 256 sinusoids of the time: fixed in the published code.
    yield f"{dit}.text_embed.codec_embed.weight", (config.num_embeds + 1, config.emb_dim)
    yield from _linear(f"{dit}.time_embed.time_mlp.0", 256, width)
    yield from _linear(f"{dit}.time_embed.time_mlp.2", width, width)
    yield from _linear(f"{dit}.input_embed.proj", joined, width)
    yield from _speaker_encoder(f"{dit}.input_embed.spk_encoder", config)
    for index in range(config.num_hidden_layers):
        block = f"{dit}.transformer_blocks.{index}"
        yield from _linear(f"{block}.attn_norm.linear", width, 6 * width)
        for name in ("to_q", "to_k", "to_v"):
            yield from _linear(f"{block}.attn.{name}", width, attended)
        yield from _linear(f"{block}.attn.to_out.0", attended, width)
        yield from _linear(f"{block}.ff.ff.0", width, width * config.ff_mult)
        yield from _linear(f"{block}.ff.ff.3", width * config.ff_mult, width)
    yield from _linear(f"{dit}.norm_out.linear", width, 2 * width)
    yield from _linear(f"{dit}.proj_out", width, config.mel_dim)


def _speaker_encoder(name: str, config: DiTConfig) -> Tensors:
    channels, kernels = config.enc_channels, config.enc_kernel_sizes
    yield from _conv(f"{name}.blocks.0.conv", config.mel_dim, channels[0], kernels[0])
    for index in range(1, len(channels) - 1):
        block, width = f"{name}.blocks.{index}", channels[index]
        split = width // config.enc_res2net_scale
        yield from _conv(f"{block}.tdnn1.conv", channels[index - 1], width, 1)
        for piece in range(config.enc_res2net_scale - 1):
            piece_name = f"{block}.res2net_block.blocks.{piece}.conv"
            yield from _conv(piece_name, split, split, kernels[index])
        yield from _conv(f"{block}.tdnn2.conv", width, width, 1)
        yield from _conv(f"{block}.se_block.conv1", width, config.enc_se_channels, 1)
        yield from _conv(f"{block}.se_block.conv2", config.enc_se_channels, width, 1)
    last, attention = channels[-1], config.enc_attention_channels
    yield from _conv(f"{name}.mfa.conv", last, last, kernels[-1])
    yield from _conv(f"{name}.asp.tdnn.conv", 3 * last, attention, 1)
    yield from _conv(f"{name}.asp.conv", attention, last, 1)
    yield from _conv(f"{name}.fc", 2 * last, config.enc_dim, 1)


def _bigvgan(config: BigVGANConfig) -> Tensors:
    vocoder, width = "token2wav.code2wav_bigvgan_model", config.upsample_initial_channel
    yield from _conv(f"{vocoder}.conv_pre", config.mel_dim, width, 7)
    blocks = 0
    for stage, kernel in enumerate(config.upsample_kernel_sizes):
        wider, width = width, width // 2
        # A transposed convolution keeps its inputs first.
        yield f"{vocoder}.ups.{stage}.0.weight", (wider, width, kernel)
        yield f"{vocoder}.ups.{stage}.0.bias", (width,)
        for size in config.resblock_kernel_sizes:
            yield from _residual_block(f"{vocoder}.resblocks.{blocks}", width, size)
            blocks += 1
    yield from _snake(f"{vocoder}.activation_post", width)
    yield f"{vocoder}.conv_post.weight", (1, width, 7)


def _residual_block(name: str, width: int, kernel: int) -> Tensors:
    for index in range(3):
        yield from _conv(f"{name}.convs1.{index}", width, width, kernel)
        yield from _conv(f"{name}.convs2.{index}", width, width, kernel)
    for index in range(6):
        yield from _snake(f"{name}.activations.{index}", width)


def _snake(name: str, width: int) -> Tensors:
    yield f"{name}.act.alpha", (width,)
    yield f"{name}.act.beta", (width,)
