"""The built-in model, and the maker of test checkpoints.

A Qwen2.5-Omni of small widths and random weights: the true module structure, file formats and
special tokens, so that everything runs without a download. What it says is noise. Imports neither
torch nor transformers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lowvram import pocket_vocabulary as vocabulary
from lowvram.config import DiTConfig, OmniConfig
from lowvram.errors import CheckpointError
from lowvram.pocket_weights import (
    Array,
    Stored,
    draw,
    names_of,
    noise,
    to_bytes,
    write_checkpoint,
    write_json,
)
from lowvram.quant import Packed, dequantize, quantize
from lowvram.specs import AWQ, VOICES
from lowvram.tensors import expected_tensors, part_of, thinker_linears
from lowvram.voices import write_voices

VERSION = "1"
"""Changes whenever the bytes of the built-in model change, so that old copies are left aside."""

SPEECH_CODES = 200
"""Codes after which the built-in model stops speaking: 4 s."""

REPLY_TOKENS = 48
"""Tokens after which the built-in model stops writing; it never ends a reply by itself."""

VOICE_FRAMES = 96
"""Mel frames of a made-up voice's reference recording: 0.96 s."""

_MANIFEST = "manifest.json"

_NOTE = """# The built-in model of LowVRAM-Omni

Made from a random seed on this machine. It has the structure and the file formats of
Qwen2.5-Omni and none of its weights: the words it writes and the voice it speaks with are noise.
It may be deleted at any time, and is made again when needed. No rights are claimed in it.
"""

Awq = bool | Literal["dequantized"]


def pocket_config() -> dict[str, Any]:
    """The `config.json` of the built-in model: 16-bit, with Talker and vocoder."""
    ids = vocabulary.special_ids()
    media = {
        "audio_token_index": ids["<|AUDIO|>"],
        "image_token_index": ids["<|IMAGE|>"],
        "video_token_index": ids["<|VIDEO|>"],
        "audio_start_token_id": ids["<|audio_bos|>"],
        "audio_end_token_id": ids["<|audio_eos|>"],
        "vision_start_token_id": ids["<|vision_bos|>"],
        "vision_end_token_id": ids["<|vision_eos|>"],
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
    }
    return {
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": True,
        "enable_talker": True,
        "thinker_config": {
            "model_type": "qwen2_5_omni_thinker",
            "audio_config": copy.deepcopy(_AUDIO),
            "text_config": _decoder(_TEXT) | {"vocab_size": vocabulary.vocabulary_size()},
            "vision_config": copy.deepcopy(_VISION),
            **media,
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "user_token_id": vocabulary.vocabulary()["user"],
        },
        "talker_config": {
            "model_type": "qwen2_5_omni_talker",
            **_decoder(_TALKER),
            **media,
            "tts_codec_end_token_id": 8294,
            "tts_codec_mask_token_id": 8296,
            "tts_codec_pad_token_id": 8292,
            "tts_codec_start_token_id": 8293,
            "tts_text_end_token_id": ids["tts_end"],
            "tts_text_pad_token_id": ids["tts_pad"],
            "tts_text_start_token_id": ids["tts_start"],
        },
        "token2wav_config": {
            "model_type": "qwen2_5_omni_token2wav",
            "bigvgan_config": copy.deepcopy(_BIGVGAN),
            "dit_config": copy.deepcopy(_DIT),
        },
        "torch_dtype": "bfloat16",
    }


def make_checkpoint(
    folder: Path | str,
    *,
    seed: int = 0,
    awq: Awq = False,
    group_size: int = 128,
    shards: int = 1,
    speech: bool = True,
    dtype: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a whole checkpoint of random weights into `folder`, which is made.

    The same seed gives the same float weights whatever else is asked for.

    Args:
        awq: True packs the Thinker's linears in the official AWQ layout and stores all else in
            float16; "dequantized" stores the very same values unpacked, those linears in float32.
        group_size: of the packing.
        shards: files the weights are cut into; with more than one there is an index.
        speech: False leaves out Talker, vocoder and voices.
        dtype: "bfloat16", "float16" or "float32"; None is bfloat16, and float16 with `awq`. The
            vocoder of a checkpoint that is not AWQ is float32, as in the official files.
        config: another `config.json`; the built-in model's by default. Its tokenizer does not
            change with it.

    Returns:
        `folder`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or ("float16" if awq else "bfloat16")
    raw = {**copy.deepcopy(dict(config or pocket_config())), "torch_dtype": dtype}
    if not speech:
        raw |= {"enable_audio_output": False, "enable_talker": False}
        raw = {key: raw[key] for key in raw if key not in ("talker_config", "token2wav_config")}
    quantization = {"quantization_config": {**AWQ, "group_size": group_size}} if awq else {}
    shape = OmniConfig.from_dict(raw | quantization)
    tensors = dict(_tensors(shape, seed, awq, dtype))
    ordered = {name: tensors[name] for name in names_of(tensors)}
    write_checkpoint(folder, ordered, shards)
    write_json(folder / "config.json", raw | quantization if awq is True else raw)
    _write_side_files(folder, shape, seed)
    return folder


def ensure() -> Path:
    """The folder of the built-in model; made on first use, and again if it was damaged.

    Made aside and moved into place whole, so that a second process never sees half of it.

    Raises:
        CheckpointError: the cache folder cannot be written.
    """
    target = cache_folder() / f"pocket-{VERSION}"
    if _is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            fresh = make_checkpoint(made / "new")
            write_json(fresh / _MANIFEST, _digests(fresh))
            _move_into_place(fresh, target, made / "old")
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"the built-in model cannot be written to {target.parent} ({error.strerror}); "
            "wanted 20 MB of writable space: set XDG_CACHE_HOME to a folder that has it"
        ) from error
    return target


def cache_folder() -> Path:
    """Where this package keeps what can be made again."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    if not chosen and sys.platform == "win32":
        chosen = os.environ.get("LOCALAPPDATA")
    return (Path(chosen) if chosen else Path.home() / ".cache") / "lowvram-omni"


def _move_into_place(fresh: Path, target: Path, aside: Path) -> None:
    # Another process may have finished first: a whole folder is never moved away.
    if _is_whole(target):
        return
    if target.exists():
        target.rename(aside)
    try:
        fresh.rename(target)
    except OSError:
        if not _is_whole(target):
            raise


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != _MANIFEST
    }


def _is_whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest) and manifest == _digests(folder)
    except (OSError, ValueError):
        return False


def _tensors(config: OmniConfig, seed: int, awq: Awq, dtype: str) -> Iterator[tuple[str, Stored]]:
    packed = thinker_linears(config.thinker) if awq else {}
    for name, shape in expected_tensors(config).items():
        linear = name.removesuffix(".weight")
        if linear in packed and name != linear:
            assert config.quant is not None
            group = config.quant.group_size
            yield from _packed(linear, quantize(draw(name, shape, seed), group), group, awq)
        else:
            plain = "float32" if part_of(name) == "token2wav" and not awq else dtype
            yield name, Stored(plain, shape, partial(_drawn, name, shape, seed, plain))


def _packed(linear: str, packed: Packed, group: int, awq: Awq) -> Iterator[tuple[str, Stored]]:
    if awq == "dequantized":
        yield f"{linear}.weight", _stored(dequantize(*packed, group).T, "float32")
        return
    yield f"{linear}.qweight", _stored(packed.qweight, "int32")
    yield f"{linear}.qzeros", _stored(packed.qzeros, "int32")
    yield f"{linear}.scales", _stored(packed.scales, "float16")


def _drawn(name: str, shape: tuple[int, ...], seed: int, dtype: str) -> bytes:
    return to_bytes(draw(name, shape, seed), dtype)


def _stored(values: Array, dtype: str) -> Stored:
    return Stored(dtype, values.shape, partial(to_bytes, values, dtype))


def _write_side_files(folder: Path, config: OmniConfig, seed: int) -> None:
    ids = vocabulary.special_ids()
    generation = {
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "thinker_max_new_tokens": REPLY_TOKENS,
    }
    if config.dit is not None:
        generation["talker_max_new_tokens"] = SPEECH_CODES
        voices = {name: _voice(name, config.dit, seed) for name in VOICES}
        write_voices(folder / "spk_dict.pt", voices)
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "tokenizer.json", vocabulary.tokenizer_json())
    write_json(folder / "tokenizer_config.json", vocabulary.tokenizer_config())
    write_json(folder / "preprocessor_config.json", vocabulary.preprocessor_config())
    write_json(folder / "chat_template.json", {"chat_template": vocabulary.CHAT_TEMPLATE})
    (folder / "README.md").write_text(_NOTE, encoding="utf-8")


def _voice(name: str, config: DiTConfig, seed: int) -> dict[str, int | Array]:
    mel = noise(f"{name}.ref_mel", (1, VOICE_FRAMES, config.mel_dim), seed)
    return {
        "bos_token": vocabulary.special_ids()[name],
        "cond": noise(f"{name}.cond", (1, config.enc_emb_dim), seed),
        # Log-mel values of a recording lie around -4.
        "ref_mel": mel - np.float32(4),
    }


def _decoder(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        **shape,
    }


_TEXT: dict[str, Any] = {
    "model_type": "qwen2_5_omni_text",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
}

_TALKER: dict[str, Any] = {
    "embedding_size": 256,
    "head_dim": 32,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "vocab_size": 8448,
}

_VISION: dict[str, Any] = {
    "model_type": "qwen2_5_omni_vision_encoder",
    "depth": 4,
    "fullatt_block_indexes": [1, 3],
    "hidden_size": 64,
    "in_channels": 3,
    "intermediate_size": 172,
    "num_heads": 4,
    "out_hidden_size": 256,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
}

_AUDIO: dict[str, Any] = {
    "model_type": "qwen2_5_omni_audio_encoder",
    "d_model": 64,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "encoder_layers": 3,
    "max_source_positions": 1500,
    "n_window": 100,
    "num_mel_bins": 128,
    "output_dim": 256,
}

_DIT: dict[str, Any] = {
    "model_type": "qwen2_5_omni_dit",
    "block_size": 24,
    "emb_dim": 32,
    "enc_attention_channels": 16,
    "enc_channels": [32, 32, 32, 32, 96],
    "enc_dilations": [1, 2, 3, 4, 1],
    "enc_dim": 24,
    "enc_emb_dim": 48,
    "enc_kernel_sizes": [5, 3, 3, 3, 1],
    "enc_res2net_scale": 2,
    "enc_se_channels": 16,
    "ff_mult": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "look_ahead_layers": [3],
    "look_backward_layers": [0, 5],
    "mel_dim": 80,
    "num_attention_heads": 4,
    "num_embeds": 8193,
    "num_hidden_layers": 6,
    "repeats": 2,
}

_BIGVGAN: dict[str, Any] = {
    "model_type": "qwen2_5_omni_bigvgan",
    "mel_dim": 80,
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "resblock_kernel_sizes": [3, 7, 11],
    "upsample_initial_channel": 64,
    "upsample_kernel_sizes": [11, 7, 4, 4, 4, 4],
    "upsample_rates": [5, 3, 2, 2, 2, 2],
}
