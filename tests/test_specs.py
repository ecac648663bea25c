"""Expected tensors against files written by transformers, and the published sizes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

from lowvram.config import OmniConfig
from lowvram.errors import CheckpointError
from lowvram.specs import SPECS, find_spec
from lowvram.tensors import (
    PARTS,
    expected_tensors,
    packed_linears,
    parameters,
    part_bytes,
    part_of,
    thinker_linears,
)


def written_by_transformers(folder: Path, raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

    model = Qwen2_5OmniForConditionalGeneration._from_config(Qwen2_5OmniConfig.from_dict(raw))
    model.save_pretrained(folder)
    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return {n: tuple(entry["shape"]) for n, entry in header.items() if n != "__metadata__"}


def odd_config() -> dict[str, Any]:
    """Shapes in which no two widths agree, so that a swapped pair cannot go unseen."""
    raw = tiny_config(hidden_size=96, intermediate_size=160, num_attention_heads=6, vocab_size=530)
    raw["thinker_config"]["text_config"]["rope_scaling"]["mrope_section"] = [2, 3, 3]
    vision, audio = raw["thinker_config"]["vision_config"], raw["thinker_config"]["audio_config"]
    vision.update(out_hidden_size=96, depth=2, fullatt_block_indexes=[1])
    audio.update(output_dim=96, encoder_layers=1, encoder_ffn_dim=80)
    raw["talker_config"].update(embedding_size=96, hidden_size=48, num_hidden_layers=1)
    dit, vocoder = (raw["token2wav_config"][f"{k}_config"] for k in ("dit", "bigvgan"))
    dit.update(
        head_dim=8, enc_res2net_scale=4, enc_channels=[12, 12, 12, 20], enc_dilations=[1, 2, 3, 1]
    )
    dit.update(enc_kernel_sizes=[5, 3, 3, 1], num_hidden_layers=2, ff_mult=3, num_embeds=90)
    vocoder.update(
        upsample_initial_channel=36, upsample_rates=[5, 3], upsample_kernel_sizes=[11, 7]
    )
    vocoder.update(resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]])
    return raw


@pytest.mark.oracle
@pytest.mark.parametrize("raw", [tiny_config(), odd_config()], ids=["tiny", "odd"])
def test_expected_tensors_are_those_transformers_writes(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    written = written_by_transformers(tmp_path, raw)
    assert expected_tensors(OmniConfig.from_dict(raw)) == written


@pytest.mark.oracle
def test_without_talker_nothing_of_speech_is_expected(tmp_path: Path) -> None:
    raw = tiny_config() | {"enable_audio_output": False}
    expected = expected_tensors(OmniConfig.from_dict(raw))
    assert expected == written_by_transformers(tmp_path, raw)
    assert {part_of(name) for name in expected} == {"embed", "visual", "audio", "text"}


@pytest.mark.parametrize(
    ("name", "billions"), [("Qwen2.5-Omni-7B", 10.73), ("Qwen2.5-Omni-3B", 5.54)]
)
def test_parameters_sum_to_the_published_count(name: str, billions: float) -> None:
    assert round(parameters(expected_tensors(SPECS[name].config)) / 1e9, 2) == billions


def test_parts_of_the_7b_have_their_published_sizes() -> None:
    tensors = expected_tensors(SPECS["Qwen2.5-Omni-7B"].config)
    millions = {part: n / 1e6 for part, n in part_bytes(tensors, lambda name: 1).items()}
    assert {part: round(n, 1) for part, n in millions.items()} == {
        "embed": 545.0,
        "visual": 676.6,
        "audio": 639.6,
        "text": 7070.6,
        "talker": 1351.4,
        "token2wav": 449.1,
    }


def test_awq_shapes() -> None:
    spec = SPECS["Qwen2.5-Omni-7B-AWQ"]
    linears = thinker_linears(spec.config.thinker)
    tensors = expected_tensors(spec.config, linears.__contains__)
    down = "thinker.model.layers.27.mlp.down_proj"
    assert linears[down] == (18944, 3584, False)
    assert tensors[f"{down}.qweight"] == (18944, 448)
    assert tensors[f"{down}.qzeros"] == (148, 448)
    assert tensors[f"{down}.scales"] == (148, 3584)
    assert f"{down}.weight" not in tensors
    assert tensors["thinker.model.layers.0.self_attn.k_proj.bias"] == (512,)
    assert "talker.model.layers.0.mlp.up_proj.weight" in tensors
    assert packed_linears(tensors) == set(linears)
    # 3.39 GB of packed layers (4.156 bits a weight, 16-bit norms and biases), and the head.
    size = part_bytes(tensors, lambda name: 4 if name.endswith(("qweight", "qzeros")) else 2)
    assert round((size["text"] - 2 * 152064 * 3584) / 1e9, 2) == 3.39


def test_awq_refuses_dimensions_that_cannot_be_packed() -> None:
    raw = tiny_config(intermediate_size=200) | {"quantization_config": {"quant_method": "awq"}}
    with pytest.raises(CheckpointError, match=r"down_proj.*200 inputs"):
        expected_tensors(OmniConfig.from_dict(raw), lambda name: name.endswith("down_proj"))


def test_every_tensor_has_a_part_and_foreign_ones_are_refused() -> None:
    tensors = expected_tensors(SPECS["Qwen2.5-Omni-3B"].config)
    assert {part_of(name) for name in tensors} == set(PARTS)
    for foreign in ("model.layers.0.mlp.up_proj.weight", "model.talker.codec_head.weight"):
        with pytest.raises(CheckpointError, match="belongs to no part"):
            part_of(foreign)


@pytest.mark.parametrize(
    "name", ["Qwen2.5-Omni-7B-AWQ", "qwen2.5-omni-7b-awq", "Qwen/Qwen2.5-Omni-7B-AWQ"]
)
def test_specs_are_found_by_name_and_hub_id(name: str) -> None:
    assert find_spec(name) is SPECS["Qwen2.5-Omni-7B-AWQ"]


def test_unknown_names_are_no_spec() -> None:
    assert find_spec("Qwen2.5-VL-7B") is None


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["Qwen2.5-Omni-7B", "Qwen2.5-Omni-3B"])
def test_specs_mean_the_same_to_transformers(name: str) -> None:
    import torch
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

    config = Qwen2_5OmniConfig.from_dict(dict(SPECS[name].raw))
    with torch.device("meta"):
        model = Qwen2_5OmniForConditionalGeneration(config)
    mine = expected_tensors(SPECS[name].config)
    assert sum(p.numel() for p in model.parameters()) == parameters(mine)
