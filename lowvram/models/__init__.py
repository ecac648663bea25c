"""The parts of Qwen2.5-Omni as plain modules, parameters named as in the published checkpoints.

All but `head_rows`, which is arithmetic, need torch: names are imported when first asked for, so
that importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowvram.models.audio import AudioTower
    from lowvram.models.bigvgan import BigVGAN
    from lowvram.models.dit import DiT
    from lowvram.models.kv_cache import KVCache
    from lowvram.models.linear import LinearFactory, dense
    from lowvram.models.talker import Talker
    from lowvram.models.text import Decoder, ThinkerText
    from lowvram.models.token2wav import Token2Wav
    from lowvram.models.vision import VisionTower

__all__ = [
    "AudioTower",
    "BigVGAN",
    "Decoder",
    "DiT",
    "KVCache",
    "LinearFactory",
    "Talker",
    "ThinkerText",
    "Token2Wav",
    "VisionTower",
    "dense",
]

_MODULE = {
    "AudioTower": "audio",
    "BigVGAN": "bigvgan",
    "Decoder": "text",
    "DiT": "dit",
    "KVCache": "kv_cache",
    "LinearFactory": "linear",
    "Talker": "talker",
    "ThinkerText": "text",
    "Token2Wav": "token2wav",
    "VisionTower": "vision",
    "dense": "linear",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE[name]}", __name__), name)
