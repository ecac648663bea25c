"""The shape of a model, read from the `config.json` of a checkpoint.

Field names are those of the published `config.json`; keys that are not used here are ignored.
Defaults are those of the Qwen2.5-Omni configuration classes in transformers (Apache-2.0), so that
a file which leaves a key out means the same model here and there. Imports neither torch nor numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lowvram.errors import CheckpointError

T = TypeVar("T")


def _known(cls: type[T], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `raw` that are fields of `cls`, lists turned into tuples."""
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return {k: _freeze(v) for k, v in raw.items() if k in names and v is not None}


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, which releases have written as `rope_scaling` and as `rope_parameters`."""
    merged = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    found: dict[str, Any] = {}
    if "mrope_section" in merged:
        found["mrope_section"] = tuple(merged["mrope_section"])
    theta = merged.get("rope_theta", raw.get("rope_theta"))
    if theta is not None:
        found["rope_theta"] = float(theta)
    return found


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A Qwen2 decoder with TMRoPE: the Thinker's text model, and the Talker's."""

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, int, int] = (16, 24, 24)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DecoderConfig:
        if raw.get("use_sliding_window"):
            raise CheckpointError(
                "the checkpoint asks for sliding-window attention, which no published Qwen2.5-Omni "
                "uses; set use_sliding_window to false in its config.json"
            )
        known = _known(cls, raw) | _rope(raw)
        if "head_dim" not in known and {"hidden_size", "num_attention_heads"} <= known.keys():
            known["head_dim"] = known["hidden_size"] // known["num_attention_heads"]
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower. `window_size` is in pixels; patches are `patch_size` pixels square."""

    depth: int = 32
    hidden_size: int = 3584
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> VisionConfig:
        return cls(**_known(cls, raw))

    @property
    def patch_values(self) -> int:
        """Values in one flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """The audio tower. One window is `2 * n_window` mel frames of 10 ms."""

    num_mel_bins: int = 128
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    d_model: int = 1280
    max_source_positions: int = 1500
    n_window: int = 100
    output_dim: int = 3584

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> AudioConfig:
        return cls(**_known(cls, raw))


@dataclass(frozen=True, kw_only=True)
class ThinkerConfig:
    """The Thinker: text decoder, both towers, and the ids that tie media to the prompt."""

    text: DecoderConfig = DecoderConfig()
    vision: VisionConfig = VisionConfig()
    audio: AudioConfig = AudioConfig()
    audio_token_index: int = 151646
    image_token_index: int = 151655
    video_token_index: int = 151656
    audio_start_token_id: int = 151647
    audio_end_token_id: int = 151648
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    position_id_per_seconds: int = 25
    seconds_per_chunk: float = 2

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ThinkerConfig:
        renamed = dict(raw)
        for kind in ("audio", "image", "video"):
            if f"{kind}_token_id" in raw:
                renamed[f"{kind}_token_index"] = raw[f"{kind}_token_id"]
        known = _known(cls, renamed)
        return cls(
            **known
            | {
                "text": DecoderConfig.from_dict(raw.get("text_config") or {}),
                "vision": VisionConfig.from_dict(raw.get("vision_config") or {}),
                "audio": AudioConfig.from_dict(raw.get("audio_config") or {}),
            }
        )


@dataclass(frozen=True, kw_only=True)
class TalkerConfig:
    """The Talker: a decoder over codec tokens, 50 a second, fed with the Thinker's states."""

    decoder: DecoderConfig = DecoderConfig(vocab_size=8448)
    embedding_size: int = 3584
    tts_text_start_token_id: int = 151860
    tts_text_end_token_id: int = 151861
    tts_text_pad_token_id: int = 151859
    tts_codec_start_token_id: int = 8293
    tts_codec_end_token_id: int = 8294
    tts_codec_pad_token_id: int = 8292
    tts_codec_mask_token_id: int = 8296

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TalkerConfig:
        decoder = {"vocab_size": 8448, **raw}
        return cls(**_known(cls, raw) | {"decoder": DecoderConfig.from_dict(decoder)})


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The flow-matching decoder from codes to mel frames, with its ECAPA speaker encoder."""

    hidden_size: int = 1024
    num_hidden_layers: int = 22
    num_attention_heads: int = 16
    head_dim: int = 64
    ff_mult: int = 2
    emb_dim: int = 512
    block_size: int = 24
    look_ahead_layers: tuple[int, ...] = (10,)
    look_backward_layers: tuple[int, ...] = (0, 20)
    repeats: int = 2
    num_embeds: int = 8193
    mel_dim: int = 80
    rope_theta: float = 10_000.0
    enc_emb_dim: int = 192
    enc_dim: int = 128
    enc_channels: tuple[int, ...] = (256, 256, 256, 256, 768)
    enc_kernel_sizes: tuple[int, ...] = (5, 3, 3, 3, 1)
    enc_dilations: tuple[int, ...] = (1, 2, 3, 4, 1)
    enc_attention_channels: int = 64
    enc_res2net_scale: int = 2
    enc_se_channels: int = 64

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DiTConfig:
        # Published files also carry the original names of three fields.
        renamed = {
            "dim": "hidden_size",
            "depth": "num_hidden_layers",
            "heads": "num_attention_heads",
        }
        aliased = {renamed[k]: v for k, v in raw.items() if k in renamed}
        return cls(**_known(cls, aliased | dict(raw)) | _rope(raw))

    @property
    def codes_per_block(self) -> int:
        return self.block_size // self.repeats


@dataclass(frozen=True, kw_only=True)
class BigVGANConfig:
    """The vocoder from mel frames (100 a second) to 24 kHz samples."""

    mel_dim: int = 80
    upsample_initial_channel: int = 1536
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    upsample_rates: tuple[int, ...] = (5, 3, 2, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (11, 7, 4, 4, 4, 4)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> BigVGANConfig:
        return cls(**_known(cls, raw))

    @property
    def samples_per_frame(self) -> int:
        product = 1
        for rate in self.upsample_rates:
            product *= rate
        return product


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How the Thinker's linears are packed (AWQ GEMM, the only packing that is read)."""

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> QuantConfig:
        method = str(raw.get("quant_method", "awq")).lower()
        version = str(raw.get("version", raw.get("format", "gemm"))).lower()
        bits = int(raw.get("bits", raw.get("w_bit", 4)))
        group = int(raw.get("group_size", raw.get("q_group_size", 128)))
        if method != "awq" or version != "gemm":
            raise CheckpointError(
                f"the checkpoint is quantized with {method}/{version}; only awq/gemm is read: "
                "use an AWQ checkpoint or the 16-bit one"
            )
        if bits != 4 or group not in (32, 64, 128):
            raise CheckpointError(
                f"the checkpoint is quantized to {bits} bits in groups of {group}; 4 bits in "
                "groups of 32, 64 or 128 are read: use another checkpoint"
            )
        if not raw.get("zero_point", True):
            raise CheckpointError(
                "the checkpoint says zero_point is false; AWQ files with zero points are read"
            )
        return cls(bits=bits, group_size=group)


@dataclass(frozen=True, kw_only=True)
class OmniConfig:
    """Everything `config.json` says about a Qwen2.5-Omni checkpoint.

    `talker`, `dit` and `bigvgan` are None where the checkpoint has no speech. `dtype` is the
    name of the stored type (`bfloat16`, `float16`, `float32`).
    """

    thinker: ThinkerConfig = ThinkerConfig()
    talker: TalkerConfig | None = None
    dit: DiTConfig | None = None
    bigvgan: BigVGANConfig | None = None
    quant: QuantConfig | None = None
    dtype: str = "bfloat16"

    @property
    def speaks(self) -> bool:
        return self.talker is not None and self.dit is not None and self.bigvgan is not None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> OmniConfig:
        """Parse a whole `config.json`.

        Raises:
            CheckpointError: another model family, or a packing that is not read.
        """
        kind = raw.get("model_type")
        if kind != "qwen2_5_omni":
            raise CheckpointError(
                f"config.json has model_type {kind!r}; wanted 'qwen2_5_omni': "
                "use a Qwen2.5-Omni checkpoint (3B or 7B, 16-bit or AWQ)"
            )
        speech = raw.get("enable_audio_output", True)
        talker = raw.get("talker_config") if speech else None
        token2wav = raw.get("token2wav_config") if speech else None
        quant = raw.get("quantization_config")
        thinker = raw.get("thinker_config") or {}
        dtype = raw.get("torch_dtype") or raw.get("dtype") or thinker.get("torch_dtype")
        return cls(
            thinker=ThinkerConfig.from_dict(thinker),
            talker=TalkerConfig.from_dict(talker) if talker is not None else None,
            dit=DiTConfig.from_dict(token2wav.get("dit_config") or {}) if token2wav else None,
            bigvgan=BigVGANConfig.from_dict(token2wav.get("bigvgan_config") or {})
            if token2wav
            else None,
            quant=QuantConfig.from_dict(quant) if quant else None,
            dtype=str(dtype or "bfloat16").removeprefix("torch."),
        )
