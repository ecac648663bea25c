"""The finished folder: what is in it, what it is worth, and that this package runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lowvram import LowVRAMOmni
from lowvram.checkpoint import resolve
from lowvram.pocket import make_checkpoint
from lowvram.quant import quantization_config, quantize
from lowvram.quantize import QuantizeSettings, prepare_job
from lowvram.tensors import thinker_linears

SIDE = (
    "README.md",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "spk_dict.pt",
    "tokenizer.json",
    "tokenizer_config.json",
)


def test_every_linear_of_the_text_layers_is_packed_and_nothing_else(whole: Path) -> None:
    made = resolve(whole)
    with made.store:
        made.verify()
        linears = thinker_linears(made.config.thinker)
        assert len(linears) == 14
        assert all(made.quantized(linear) for linear in linears)
        packed = [name for name in made.store.names() if name.endswith(".qweight")]
        assert len(packed) == len(linears)


def test_all_else_is_there_byte_for_byte(source: Path, whole: Path) -> None:
    with resolve(source).store as true, resolve(whole).store as made:
        kept = [n for n in true.names() if not n.startswith("thinker.model.layers.")]
        assert len(kept) > 100
        for name in kept:
            before, after = true.info(name), made.info(name)
            assert (before.dtype, before.shape) == (after.dtype, after.shape), name
            assert torch.equal(true.read(name), made.read(name)), name
    for name in SIDE:
        assert (whole / name).read_bytes() == (source / name).read_bytes(), name


def test_the_config_says_how_it_is_packed_and_is_the_source_s_otherwise(
    source: Path, whole: Path
) -> None:
    before = json.loads((source / "config.json").read_text())
    after = json.loads((whole / "config.json").read_text())
    assert after.pop("quantization_config") == quantization_config(128)
    assert after == before


def test_the_index_names_every_tensor_and_the_sum_of_their_bytes(whole: Path) -> None:
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    with resolve(whole).store as store:
        infos = [store.info(name) for name in store.names()]
        assert index["weight_map"] == {info.name: info.file.name for info in infos}
        assert index["metadata"]["total_size"] == sum(info.nbytes for info in infos)


def test_the_result_answers_in_words_and_speech(whole: Path) -> None:
    with LowVRAMOmni.from_pretrained(whole, device="cpu") as omni:
        result = omni.generate(
            [{"role": "user", "content": "Hello"}], max_new_tokens=4, max_speech_seconds=0.2
        )
    assert result.text
    assert result.audio is not None and np.isfinite(result.audio).all() and len(result.audio)


def test_the_search_is_no_worse_than_rounding_and_the_report_says_so(whole: Path) -> None:
    report = json.loads((whole / "quantization.json").read_text())
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    for layer in report["layers"]:
        assert 0 < layer["error_after"] <= layer["error_before"] < 0.1
        assert len(layer["linears"]) == 7
    calibration = report["calibration"]
    assert calibration["conversations"] == 4 and len(calibration["held_out"]) == 1
    assert min(calibration["tokens"].values()) > 0
    assert sum(calibration["tokens"].values()) <= 4 * 96


def test_the_picture_has_bars_in_both_colours(whole: Path) -> None:
    with Image.open(whole / "quantization.png") as image:
        colours = {colour for _, colour in image.getcolors(1 << 16) or ()}
    assert {(0xA0, 0xA0, 0xA0), (0x20, 0x60, 0xC0)} <= colours


def test_rounding_without_inputs_is_rounding_to_the_nearest(source: Path, rounded: Path) -> None:
    """Against the packer's own rounding of the stored weights."""
    name = "thinker.model.layers.1.mlp.down_proj"
    with resolve(source).store as true, resolve(rounded).store as made:
        weight = true.read(f"{name}.weight").float().numpy()
        wanted = quantize(weight, 128)
        assert np.array_equal(made.read(f"{name}.scales").numpy(), wanted.scales)
        same = made.read(f"{name}.qweight").numpy() == wanted.qweight
    assert same.mean() > 0.99


@pytest.mark.parametrize(("dtype", "group"), [("float32", 32), ("float16", 64)])
def test_other_types_and_groups(
    dtype: str, group: int, quantize: Callable[..., Any], tmp_path: Path, small: Callable[..., Any]
) -> None:
    model = make_checkpoint(tmp_path / "model", config=small(), dtype=dtype, speech=False)
    quantize(model, tmp_path / "result", group_size=group, samples=2)
    made = resolve(tmp_path / "result")
    with made.store:
        made.verify()
        assert made.config.quant is not None and made.config.quant.group_size == group
        name = "thinker.model.layers.0.input_layernorm.weight"
        assert made.store.info(name).dtype == {"float32": "F32", "float16": "F16"}[dtype]


def test_shards_are_cut_and_the_largest_tensor_has_its_own(
    source: Path, rounded: Path, quantize: Callable[..., Any], tmp_path: Path
) -> None:
    result = tmp_path / "result"
    quantize(source, result, method="rtn", calibration="none", shard_bytes=300_000)
    files = sorted(path.name for path in result.glob("*.safetensors"))
    assert len(files) > 8
    assert files == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    with resolve(result).store as cut, resolve(rounded).store as uncut:
        assert set(cut.names()) == set(uncut.names())
        for name in cut.names():
            assert torch.equal(cut.read(name), uncut.read(name)), name


def test_activations_on_disk_change_nothing(
    source: Path,
    whole: Path,
    quantize: Callable[..., Any],
    read: Callable[..., Any],
    tmp_path: Path,
) -> None:
    settings = QuantizeSettings(device="cpu", samples=4, seq_len=96)
    job = prepare_job(source, tmp_path / "result", settings)
    job.source.checkpoint.store.close()
    least = job.plan.memory - job.plan.activations
    assert job.plan.activations > 0
    quantize(source, tmp_path / "result", max_memory=least)
    assert read(tmp_path / "result") == read(whole)


def test_nothing_is_left_beside_the_result(whole: Path) -> None:
    assert list(whole.parent.iterdir()) == [whole]
