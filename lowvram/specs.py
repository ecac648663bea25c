"""The known checkpoints: shapes as in their published `config.json`, voices, hub ids.

Sources: the `config.json` files of Qwen/Qwen2.5-Omni-7B and -3B on the Hugging Face hub
(Apache-2.0 and the Qwen research licence). The 3B Talker's inner width, head counts and rotary
sections could not be read there: they are those of Qwen2.5-0.5B, which it is built on, xtuner's
configuration of it says the same, and with them the parameters sum to the published 5.54 billion. A
checkpoint that is opened always speaks for itself; this table is for planning without one, and for
finding one by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowvram.config import OmniConfig

POCKET = "pocket"
"""Name of the built-in model."""

VOICES: dict[str, int] = {"Chelsie": 151872, "Ethan": 151870}
"""Voices of the official checkpoints, and the text token each begins its speech with."""

VOICE_FRAMES = 400
"""Mel frames (100 a second) of an official voice's reference recording."""

AWQ: dict[str, Any] = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": ["visual"],
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
"""`quantization_config` as AutoAWQ writes it. Its list of what was left alone is incomplete, for
towers, Talker and vocoder are 16-bit too; readers go by what the file holds."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One known checkpoint.

    `hub_id` is None where nobody publishes it; `raw` is its `config.json`; `size` is the published
    parameter count in billions.
    """

    name: str
    hub_id: str | None
    size: float
    raw: Mapping[str, Any]
    voices: tuple[str, ...] = tuple(VOICES)

    @property
    def config(self) -> OmniConfig:
        return OmniConfig.from_dict(self.raw)


def _rope(*sections: int) -> dict[str, Any]:
    return {"mrope_section": [*sections], "rope_type": "default", "type": "default"}


def _text(**shape: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_omni_text",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_scaling": _rope(16, 24, 24),
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        **shape,
    }


def _thinker(text: dict[str, Any]) -> dict[str, Any]:
    width = text["hidden_size"]
    return {
        "model_type": "qwen2_5_omni_thinker",
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "d_model": 1280,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "encoder_layers": 32,
            "max_source_positions": 1500,
            "n_window": 100,
            "num_mel_bins": 128,
            "output_dim": width,
        },
        "vision_config": {
            "model_type": "qwen2_5_omni_vision_encoder",
            "depth": 32,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "hidden_size": 1280,
            "in_channels": 3,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
        },
        "text_config": text,
        "audio_token_index": 151646,
        "image_token_index": 151655,
        "video_token_index": 151656,
        "audio_start_token_id": 151647,
        "audio_end_token_id": 151648,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "eos_token_id": 151645,
        "pad_token_id": 151643,
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
    }


def _talker(embedding_size: int, rope: dict[str, Any], **shape: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_omni_talker",
        "embedding_size": embedding_size,
        "hidden_size": 896,
        "max_position_embeddings": 32768,
        "num_hidden_layers": 24,
        "rms_norm_eps": 1e-6,
        "rope_scaling": rope,
        "rope_theta": 1_000_000.0,
        "tts_codec_end_token_id": 8294,
        "tts_codec_mask_token_id": 8296,
        "tts_codec_pad_token_id": 8292,
        "tts_codec_start_token_id": 8293,
        "tts_text_end_token_id": 151861,
        "tts_text_pad_token_id": 151859,
        "tts_text_start_token_id": 151860,
        "vocab_size": 8448,
        **shape,
    }


_DIT: dict[str, Any] = {
    "model_type": "qwen2_5_omni_dit",
    "block_size": 24,
    "emb_dim": 512,
    "enc_attention_channels": 64,
    "enc_channels": [256, 256, 256, 256, 768],
    "enc_dilations": [1, 2, 3, 4, 1],
    "enc_dim": 128,
    "enc_emb_dim": 192,
    "enc_kernel_sizes": [5, 3, 3, 3, 1],
    "enc_res2net_scale": 2,
    "enc_se_channels": 64,
    "ff_mult": 2,
    "head_dim": 64,
    "hidden_size": 1024,
    "look_ahead_layers": [10],
    "look_backward_layers": [0, 20],
    "mel_dim": 80,
    "num_attention_heads": 16,
    "num_embeds": 8193,
    "num_hidden_layers": 22,
    "repeats": 2,
}

_BIGVGAN: dict[str, Any] = {
    "model_type": "qwen2_5_omni_bigvgan",
    "mel_dim": 80,
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "resblock_kernel_sizes": [3, 7, 11],
    "upsample_initial_channel": 1536,
    "upsample_kernel_sizes": [11, 7, 4, 4, 4, 4],
    "upsample_rates": [5, 3, 2, 2, 2, 2],
}


def _omni(thinker: dict[str, Any], talker: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": True,
        "enable_talker": True,
        "thinker_config": thinker,
        "talker_config": talker,
        "token2wav_config": {
            "model_type": "qwen2_5_omni_token2wav",
            "dit_config": copy.deepcopy(_DIT),
            "bigvgan_config": copy.deepcopy(_BIGVGAN),
        },
        "torch_dtype": "bfloat16",
    }


_7B = _omni(
    _thinker(
        _text(
            hidden_size=3584,
            intermediate_size=18944,
            num_attention_heads=28,
            num_hidden_layers=28,
            num_key_value_heads=4,
            vocab_size=152064,
        )
    ),
    _talker(
        3584,
        _rope(16, 24, 24),
        head_dim=128,
        intermediate_size=18944,
        num_attention_heads=12,
        num_key_value_heads=4,
    ),
)

_3B = _omni(
    _thinker(
        _text(
            hidden_size=2048,
            intermediate_size=11008,
            num_attention_heads=16,
            num_hidden_layers=36,
            num_key_value_heads=2,
            vocab_size=151936,
        )
    ),
    _talker(
        2048,
        _rope(16, 16, 0),
        head_dim=64,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
)


def _quantized(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same model with its text layers packed; AutoAWQ stores everything else in float16."""
    return {**raw, "quantization_config": AWQ, "torch_dtype": "float16"}


SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(name="Qwen2.5-Omni-7B", hub_id="Qwen/Qwen2.5-Omni-7B", size=10.73, raw=_7B),
        Spec(name="Qwen2.5-Omni-3B", hub_id="Qwen/Qwen2.5-Omni-3B", size=5.54, raw=_3B),
        Spec(
            name="Qwen2.5-Omni-7B-AWQ",
            hub_id="Qwen/Qwen2.5-Omni-7B-AWQ",
            size=10.73,
            raw=_quantized(_7B),
        ),
        Spec(name="Qwen2.5-Omni-3B-AWQ", hub_id=None, size=5.54, raw=_quantized(_3B)),
    )
}


def find_spec(name: str) -> Spec | None:
    """The known checkpoint of that name, with or without its owner, in any case; else None."""
    wanted = name.lower().removeprefix("qwen/")
    return next((spec for spec in SPECS.values() if spec.name.lower() == wanted), None)
