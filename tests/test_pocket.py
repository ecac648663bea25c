"""The built-in model: its files mean to transformers, torch and tokenizers what they mean to us."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from tokenizers import Tokenizer

from lowvram import pocket
from lowvram.config import OmniConfig
from lowvram.errors import CheckpointError
from lowvram.pocket_vocabulary import special_ids, vocabulary_size, word_ids
from lowvram.tensors import expected_tensors, thinker_linears


@pytest.fixture(scope="module")
def folder() -> Path:
    return pocket.ensure()


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def test_files_are_small_and_complete(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20_000_000
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "preprocessor_config.json",
        "spk_dict.pt",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "noise" in (folder / "README.md").read_text()


def test_bytes_are_the_same_everywhere(folder: Path) -> None:
    # Where these change, pocket.VERSION must change with them: a cache would keep the old ones.
    digests = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]
        for name in ("model.safetensors", "spk_dict.pt", "config.json", "tokenizer.json")
    }
    assert (pocket.VERSION, digests) == (
        "1",
        {
            "model.safetensors": "775dbb7a8220eee0",
            "spk_dict.pt": "f1851df6b0c6cadf",
            "config.json": "1dab3ae7bd093be8",
            "tokenizer.json": "404b1246a96e27d0",
        },
    )


def test_making_it_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from lowvram import pocket; pocket.ensure();"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_damaged_copy_is_made_again(folder: Path) -> None:
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:1000] + b"\xff" + good[1001:])
    (folder / "config.json").unlink()
    assert pocket.ensure() == folder
    assert weights.read_bytes() == good
    assert (folder / "config.json").is_file()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_processes_at_once_agree(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = "from lowvram import pocket; print(pocket.ensure())"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = {run.communicate()[0].strip() for run in runs}
    assert answers == {str(tmp_path / "lowvram-omni" / f"pocket-{pocket.VERSION}")}
    made = [path.name for path in (tmp_path / "lowvram-omni").iterdir()]
    assert made == [f"pocket-{pocket.VERSION}"]
    for path in Path(answers.pop()).iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_a_cache_that_cannot_be_written_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"cannot be written.*XDG_CACHE_HOME"):
        pocket.ensure()


def test_weights_do_not_depend_on_what_else_is_asked(tmp_path: Path, folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    cut = pocket.make_checkpoint(tmp_path, shards=3, speech=False)
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    shards = {name: load_file(cut / name) for name in names}
    assert sum(len(shard) for shard in shards.values()) == len(index["weight_map"])
    total = 0
    for name, file in index["weight_map"].items():
        assert torch.equal(shards[file][name], whole[name])
        total += shards[file][name].nbytes
    assert index["metadata"]["total_size"] == total
    config = OmniConfig.from_dict(json.loads((cut / "config.json").read_text()))
    assert not config.speaks and not (cut / "spk_dict.pt").exists()
    assert set(index["weight_map"]) == set(expected_tensors(config))


def test_another_seed_is_another_model(tmp_path: Path, folder: Path) -> None:
    other = load_file(pocket.make_checkpoint(tmp_path, seed=1) / "model.safetensors")
    mine = load_file(folder / "model.safetensors")
    assert all(not torch.equal(other[name], mine[name]) for name in mine)


def test_official_types(tmp_path: Path, folder: Path) -> None:
    kinds = {n: e["dtype"] for n, e in header(folder / "model.safetensors").items() if n[0] != "_"}
    assert {kinds[n] for n in kinds if n.startswith("token2wav.")} == {"F32"}
    assert {kinds[n] for n in kinds if not n.startswith("token2wav.")} == {"BF16"}
    awq = pocket.make_checkpoint(tmp_path, awq=True) / "model.safetensors"
    for name, entry in header(awq).items():
        if name != "__metadata__":
            packed = name.endswith((".qweight", ".qzeros"))
            assert entry["dtype"] == ("I32" if packed else "F16"), name


@pytest.mark.parametrize("group", [32, 128])
def test_awq_and_its_dequantized_twin_hold_the_same_values(tmp_path: Path, group: int) -> None:
    packed = pocket.make_checkpoint(tmp_path / "awq", awq=True, group_size=group)
    plain = pocket.make_checkpoint(tmp_path / "twin", awq="dequantized", group_size=group)
    raw = json.loads((packed / "config.json").read_text())
    config = OmniConfig.from_dict(raw)
    assert raw["quantization_config"] == {
        "bits": 4,
        "group_size": group,
        "modules_to_not_convert": ["visual"],
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    mine, twin = (load_numpy(f / "model.safetensors") for f in (packed, plain))
    linears = thinker_linears(config.thinker)
    expected = expected_tensors(config, linears.__contains__)
    assert {name: value.shape for name, value in mine.items()} == expected
    for name, value in twin.items():
        linear = name.removesuffix(".weight")
        if linear not in linears or name == linear:
            assert np.array_equal(mine[name], value), name
            continue
        # Independent of the packer: nibble 4 of each int32 holds output 1 of its eight.
        q = mine[f"{linear}.qweight"].view(np.uint32) >> 16 & 15
        zero = mine[f"{linear}.qzeros"].view(np.uint32) >> 16 & 15
        scale = mine[f"{linear}.scales"][:, 1::8].astype(np.float32)
        rows = np.arange(len(q)) // group
        values = (q.astype(np.float32) - zero[rows].astype(np.float32)) * scale[rows]
        assert value.dtype == np.float32 and np.array_equal(value[1::8].T, values), name


def test_quantized_weights_are_near_the_float_ones(tmp_path: Path) -> None:
    name = "thinker.model.layers.0.mlp.down_proj.weight"
    mine, twin = (
        load_file(pocket.make_checkpoint(tmp_path / kind, **options) / "model.safetensors")[name]
        for kind, options in (("plain", {"dtype": "float32"}), ("twin", {"awq": "dequantized"}))
    )
    step = (mine.max() - mine.min()) / 15
    assert (twin - mine).abs().max() <= step
    # Rounding to the nearest of evenly spread values is off by a quarter of a step on average.
    assert 0.2 * step < (twin - mine).abs().mean() < 0.27 * step


def test_tokenizer_knows_the_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = (
        "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>the river, héllo 你好 🦉<|im_end|>\n"
    )
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for name in ("<|im_start|>", "<|AUDIO|>", "<|audio_bos|>", "<|im_end|>"):
        assert tokenizer.token_to_id(name) == special_ids()[name] and special_ids()[name] in ids
    for word in word_ids():
        assert tokenizer.encode(tokenizer.decode([word])).ids == [word]
    assert max(special_ids().values()) < vocabulary_size()


@pytest.mark.oracle
def test_transformers_reads_the_tokenizer_alike(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    mine = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "<|im_start|>user\nWhat's  in 2 pictures?\n\n<|vision_bos|><|IMAGE|><|vision_eos|> hé你"
    assert theirs(text).input_ids == mine.encode(text).ids
    assert theirs.audio_token == "<|AUDIO|>" and theirs.eos_token == "<|im_end|>"
    conversation = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "audio", "audio": "a.wav"},
                {"type": "video", "video": "a.mp4"},
                {"audio": "b.wav"},
                {"type": "text", "text": "What is it?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A river."}]},
        {"role": "user", "content": "Thanks."},
    ]
    written = theirs.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert written == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_bos|><|IMAGE|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|>"
        "<|vision_bos|><|VIDEO|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|>"
        "What is it?<|im_end|>\n"
        "<|im_start|>assistant\nA river.<|im_end|>\n"
        "<|im_start|>user\nThanks.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.oracle
def test_transformers_loads_every_tensor_and_speaks(folder: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedModel, Qwen2_5OmniForConditionalGeneration

    omni: Any = Qwen2_5OmniForConditionalGeneration
    load: Any = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    model, info = load(omni, folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    model.load_speakers(folder / "spk_dict.pt")
    assert model.thinker.generation_config.eos_token_id == special_ids()["<|im_end|>"]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("<|im_start|>user\nthe river<|im_end|>\n", return_tensors="pt").input_ids
    tokens, wave = model.eval().generate(
        input_ids=ids,
        speaker="Ethan",
        thinker_max_new_tokens=24,
        thinker_do_sample=False,
        talker_max_new_tokens=40,
    )
    reply = tokens[0, ids.shape[1] :].tolist()
    assert len(reply) == 24 and len(set(reply)) > 8
    assert set(reply) <= set(word_ids())
    # Audible, not clipped, about zero.
    assert wave.shape == (40 * 480,)
    assert 0.03 < wave.std() < 0.3 and wave.abs().max() < 0.9 and wave.mean().abs() < 1e-3
