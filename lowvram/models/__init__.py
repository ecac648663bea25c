"""The parts of Qwen2.5-Omni as plain modules, parameters named as in the published checkpoints."""

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
