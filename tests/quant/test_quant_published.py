"""The list of what was not converted, by both of the ways in which it is read."""

from __future__ import annotations

import re

import pytest

from lowvram.quant import quantization_config

KEPT = (
    "thinker.visual.blocks.0.attn.q",
    "thinker.model.visual.blocks.0.mlp.gate_proj",
    "thinker.audio_tower.layers.0.self_attn.q_proj",
    "thinker.model.audio_tower.layers.0.fc1",
    "thinker.lm_head",
    "talker.model.layers.0.mlp.gate_proj",
    "token2wav.code2wav_dit_model.transformer_blocks.0.ff.ff.0",
)
PACKED = (
    "thinker.model.layers.0.self_attn.q_proj",
    "thinker.model.language_model.layers.27.mlp.down_proj",
    "model.layers.3.mlp.gate_proj",
)
LISTED = quantization_config(128)["modules_to_not_convert"]


def substring(name: str) -> bool:
    return any(listed in name for listed in LISTED)


def anchored(name: str) -> bool:
    # transformers 5: a match from the first character, or an end of the name.
    return any(re.match(f"{listed}\\.", name) or re.match(listed, name) for listed in LISTED)


@pytest.mark.parametrize("reading", [substring, anchored])
def test_the_list_tells_towers_from_packed_layers(reading: object) -> None:
    assert callable(reading)
    assert [name for name in KEPT if not reading(name)] == []
    assert [name for name in PACKED if reading(name)] == []


def test_the_rest_is_what_readers_ask_for() -> None:
    config = quantization_config(64)
    del config["modules_to_not_convert"]
    assert config == {
        "bits": 4,
        "group_size": 64,
        "quant_method": "awq",
        "sym": False,
        "version": "gemm",
        "zero_point": True,
    }
