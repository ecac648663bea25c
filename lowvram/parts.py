"""The modules that are loaded and dropped as one: how each is built, and where its weights lie."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from lowvram.checkpoint import Checkpoint
from lowvram.models.audio import AudioTower
from lowvram.models.head import PiecewiseHead
from lowvram.models.linear import LinearFactory, dense
from lowvram.models.talker import Talker
from lowvram.models.text import ThinkerText
from lowvram.models.token2wav import Token2Wav
from lowvram.models.vision import VisionTower
from lowvram.offload import Part, torch_dtype
from lowvram.quant import (
    HEAD_OPTIONS,
    HeadBits,
    QuantLinear,
    RoundedHead,
    RoundedLinear,
    Scratch,
)

Kernel = Literal["auto", "reference"]

HEAD = "thinker.lm_head"


def build_parts(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    speech: bool,
    kernel: Kernel,
    scratch: Scratch | None = None,
    used: Collection[str] = (),
    dit_dtype: torch.dtype = torch.bfloat16,
) -> list[Part]:
    """Every module a request may need, in the order of the phases.

    Token2wav is float32 whatever `dtype` says: its authors state that 16 bits are audible
    (QwenLM/Qwen2.5-Omni#90). Without `speech` the Talker and the vocoder are not even named, so
    nothing can read them. Packed and rounded linears share `scratch`, or one of their own. `used`
    are the options in effect (see `planner/allowed.py`), of which `vocoder16` has the layers of the
    DiT in `dit_dtype`.
    """
    config = checkpoint.config
    scratch = scratch or Scratch()
    head = next((bits for name, bits in HEAD_OPTIONS.items() if name in used), None)
    linear = linear_factory(checkpoint, dtype, kernel, scratch, head)
    talking = rounded(scratch) if "talker8" in used else dense
    thinker = config.thinker
    parts = [
        Part("visual", "thinker.visual.", partial(VisionTower, thinker.vision), dtype),
        Part("audio", "thinker.audio_tower.", partial(AudioTower, thinker.audio), dtype),
        Part("text", "thinker.", partial(ThinkerText, thinker, linear), dtype, _text_units),
    ]
    if speech and config.talker and config.dit and config.bigvgan:
        talker = partial(Talker, config.talker, talking)
        layers = dit_dtype if "vocoder16" in used else torch.float32
        parts += [
            Part("talker", "talker.", talker, dtype, _talker_units),
            Part("token2wav", "token2wav.", partial(Token2Wav, config, layers), torch.float32),
        ]
    return parts


def _text_units(module: nn.Module) -> Sequence[nn.Module]:
    """The layers, then the pieces of the head, if it has any."""
    assert isinstance(module, ThinkerText)
    return [*module.model.layers, *getattr(module.lm_head, "pieces", ())]


def _talker_units(module: nn.Module) -> Sequence[nn.Module]:
    assert isinstance(module, Talker)
    return [*module.model.layers]


def rounded(scratch: Scratch) -> LinearFactory:
    """Every linear in int8, whatever the name."""

    def build(name: str, in_features: int, out_features: int, bias: bool) -> nn.Module:
        return RoundedLinear(in_features, out_features, bias, scratch)

    return build


def linear_factory(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    kernel: Kernel,
    scratch: Scratch,
    head_bits: HeadBits | None,
) -> LinearFactory:
    """Dense or packed, linear by linear, by what the file holds.

    The list of modules that a checkpoint's own config says are not converted is incomplete in the
    published AWQ file, so it is not asked.
    """
    quant = checkpoint.config.quant

    def build(name: str, in_features: int, out_features: int, bias: bool) -> nn.Module:
        if head_bits is not None and name == HEAD:
            return RoundedHead(in_features, out_features, head_bits, scratch)
        if name == HEAD and not checkpoint.quantized(name):
            return PiecewiseHead(in_features, out_features, dtype.itemsize, "lm_head.weight")
        if quant is None or not checkpoint.quantized(name):
            return dense(name, in_features, out_features, bias)
        return QuantLinear(
            in_features,
            out_features,
            bias,
            quant.group_size,
            dtype=dtype,
            scales_dtype=torch_dtype(checkpoint.store.info(f"{name}.scales")),
            kernel=kernel,
            scratch=scratch,
        )

    return build
