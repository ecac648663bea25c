"""The official low-VRAM demo's memory: the Thinker as transformers runs it, by our own meter.

Its published figures (the model card of Qwen/Qwen2.5-Omni-7B-AWQ) are what the demo prints after a
request: torch's `max_memory_allocated`, in which the driver's context has no part. The most is held
when the whole prompt's logits come out of the head. What is there then:

- the Thinker's 4-bit text model with its 16-bit embedding and head; the towers are back on the host
- the logits of every position, of which the last is used            7B: 297 KiB a token
- the hidden states of all layers, of which the Talker reads two     7B: 203 KiB a token
- keys and values of all layers                                      7B:  56 KiB a token

Not counted, to err on that side: the pixels (as given, and in 16 bits) and the video's vectors,
which are still referred to then. They would be 33 KiB a token more, where 756 of 781 are video.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowvram.config import DecoderConfig, OmniConfig
from lowvram.offload import Meter, open_device
from lowvram.tensors import expected_tensors, is_packed, part_bytes

CARD_GIB = {15: 11.77, 30: 17.84, 60: 30.31}
"""Peak by seconds of video, in the table of the card; its "GB" are GiB."""

CARD_MODEL = "Qwen2.5-Omni-7B-AWQ"

DTYPE = torch.float16
"""What the demo loads the checkpoint in."""


def card_bytes(model: str, seconds: float) -> int | None:
    """The published peak of that model over that much video; None where nothing is published."""
    if model != CARD_MODEL or seconds not in CARD_GIB:
        return None
    return round(CARD_GIB[int(seconds)] * 2**30)


@dataclass(frozen=True, kw_only=True)
class StockPeak:
    """The demo at its peak, in bytes: what was measured, and what arithmetic says it must be."""

    weights: int
    measured_activations: int
    predicted: Mapping[str, int]

    @property
    def measured_peak_bytes(self) -> int:
        return self.weights + self.measured_activations

    @property
    def predicted_peak_bytes(self) -> int:
        return self.weights + sum(self.predicted.values())


class StockThinker:
    """The Thinker of the installed transformers at a model's true shapes, on `meta`."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw
        self._config = OmniConfig.from_dict(dict(raw))

    def peak(self, tokens: int) -> StockPeak:
        """What a prompt of that many tokens takes in prefill."""
        text = self._config.thinker.text
        return StockPeak(
            weights=_weights(self._config),
            measured_activations=self._measure(tokens),
            predicted={name: tokens * size for name, size in bytes_per_token(text).items()},
        )

    def _measure(self, tokens: int) -> int:
        from transformers import DynamicCache

        meter = Meter(open_device("meta"))
        model = self._model
        with meter.phase("prefill"), torch.no_grad():
            out = model(
                inputs_embeds=self._empty(1, tokens, self._config.thinker.text.hidden_size),
                position_ids=torch.empty(3, 1, tokens, dtype=torch.long, device="meta"),
                past_key_values=DynamicCache(),
                use_cache=True,
                output_hidden_states=True,
            )
        del out
        return meter.phases[0].peak_bytes

    @cached_property
    def _model(self) -> Any:
        """As published, but for an attention that allocates only its output, as the fused kernels
        do (the demo asks for FlashAttention 2)."""
        from transformers import (
            AttentionInterface,
            AttentionMaskInterface,
            Qwen2_5OmniThinkerConfig,
            Qwen2_5OmniThinkerForConditionalGeneration,
        )

        AttentionInterface.register(_FUSED, _fused_attention)
        AttentionMaskInterface.register(_FUSED, _no_mask)
        config = Qwen2_5OmniThinkerConfig(**dict(self._raw["thinker_config"]))
        for part in (config, config.text_config, config.vision_config, config.audio_config):
            part._attn_implementation = _FUSED
        with torch.device("meta"):
            return Qwen2_5OmniThinkerForConditionalGeneration(config).to(DTYPE).eval()

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=DTYPE, device="meta")


def bytes_per_token(text: DecoderConfig) -> dict[str, int]:
    """What each token of the prompt adds at the peak."""
    size = DTYPE.itemsize
    kv_width = text.num_key_value_heads * text.head_dim
    return {
        "logits": text.vocab_size * size,
        "hidden states": (text.num_hidden_layers + 1) * text.hidden_size * size,
        "keys and values": 2 * text.num_hidden_layers * kv_width * size,
    }


def _weights(config: OmniConfig) -> int:
    """Bytes of the text model with its embedding, as the file holds them."""
    tensors = expected_tensors(config, lambda linear: config.quant is not None)
    size = part_bytes(tensors, lambda name: (torch.int32 if is_packed(name) else DTYPE).itemsize)
    return size["text"] + size["embed"]


_FUSED = "lowvram_output_only"


def _fused_attention(
    module: object, q: Tensor, k: Tensor, v: Tensor, mask: object = None, **options: object
) -> tuple[Tensor, None]:
    """[B, heads, T, D] -> [B, T, heads, D], which is how transformers wants it."""
    batch, heads, rows, width = q.shape
    return q.new_empty(batch, rows, heads, width), None


def _no_mask(*given: object, **options: object) -> None:
    """A causal kernel needs none."""
