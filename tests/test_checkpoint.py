"""Finding, opening and checking a checkpoint: what each kind of damage is called."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram import hub
from lowvram.checkpoint import Checkpoint, Difference, resolve
from lowvram.errors import CheckpointError, UsageError
from lowvram.pocket import REPLY_TOKENS, SPEECH_CODES, make_checkpoint
from lowvram.pocket_vocabulary import special_ids

UP = "thinker.model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def whole() -> Checkpoint:
    return resolve("pocket")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return resolve(make_checkpoint(tmp_path_factory.mktemp("awq"), awq=True))


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Checkpoint:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return resolve(folder)


def test_the_built_in_model(whole: Checkpoint) -> None:
    assert whole.name == "pocket"
    assert whole.check() == [] and whole.voices == ("Chelsie", "Ethan")
    assert whole.stored_dtype == "bfloat16" and not whole.quantized(UP)
    assert whole.generation.eos_token_ids == (special_ids()["<|im_end|>"],)
    assert whole.generation.codec_end_ids == (8292, 8294)
    assert whole.generation.max_codes == SPEECH_CODES
    assert whole.generation.max_new_tokens == REPLY_TOKENS
    assert whole.preprocessor["merge_size"] == 2
    assert whole.tokenizer() is whole.tokenizer()
    whole.verify()


def test_the_packed_model(packed: Checkpoint) -> None:
    assert packed.check() == [] and packed.stored_dtype == "float16"
    assert packed.quantized(UP) and not packed.quantized("thinker.lm_head")
    assert not packed.quantized("talker.model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("awq", [False, True])
def test_sharded_and_mute(tmp_path: Path, awq: bool) -> None:
    checkpoint = resolve(str(make_checkpoint(tmp_path, awq=awq, shards=4, speech=False)))
    assert checkpoint.check() == [] and checkpoint.name == str(tmp_path)
    assert not checkpoint.config.speaks and checkpoint.voices == ()
    assert checkpoint.load_voices() == {} and checkpoint.generation.codec_end_ids == ()
    with pytest.raises(UsageError, match="does not speak"):
        checkpoint.check_speaker(None)


@pytest.mark.parametrize(
    ("speaker", "name"), [(None, "Chelsie"), ("Ethan", "Ethan"), ("Chelsie", "Chelsie")]
)
def test_voices_by_name(whole: Checkpoint, speaker: str | None, name: str) -> None:
    assert whole.check_speaker(speaker) == name


def test_an_unknown_voice_lists_the_known(whole: Checkpoint) -> None:
    with pytest.raises(UsageError, match=r"'Dolly'.*Chelsie, Ethan"):
        whole.check_speaker("Dolly")


def test_voices_are_those_torch_loads(whole: Checkpoint) -> None:
    voices = whole.load_voices()
    read = torch.load(whole.folder / "spk_dict.pt", weights_only=True)
    assert list(voices) == list(read) == ["Chelsie", "Ethan"]
    for name, voice in voices.items():
        assert voice.bos_token == read[name]["bos_token"] == special_ids()[name]
        assert torch.equal(voice.cond, read[name]["cond"])
        assert torch.equal(voice.ref_mel, read[name]["ref_mel"])
    assert not torch.equal(voices["Ethan"].cond, voices["Chelsie"].cond)


def test_differences_are_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["thinker.model.norm.weight"]
        tensors[f"{UP}.weight"] = torch.zeros(3, 4)
        tensors["talker.codec_head.weight"] = tensors["talker.codec_head.weight"].to(torch.int8)
        tensors["thinker.model.rotary_emb.inv_freq"] = torch.zeros(2)

    checkpoint = rewrite(tmp_path, change)
    mute = [
        Difference("shape", f"{UP}.weight", "[3, 4]", "[512, 256]"),
        Difference("missing", "thinker.model.norm.weight", wanted="[256]"),
        Difference("unexpected", "thinker.model.rotary_emb.inv_freq"),
    ]
    talker = Difference("type", "talker.codec_head.weight", "I8", "BF16 or F16 or F32")

    def by_name(difference: Difference) -> str:
        return difference.name

    assert sorted(checkpoint.check(speech=False), key=by_name) == mute
    assert sorted(checkpoint.check(), key=by_name) == sorted([*mute, talker], key=by_name)
    assert str(mute[0]) == f"shape {UP}.weight: [3, 4], wanted [512, 256]"
    with pytest.raises(CheckpointError, match=r"\(and 1 more\).*doctor"):
        checkpoint.verify(speech=False)


def test_too_much_in_a_file_does_no_harm(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    checkpoint = rewrite(tmp_path, lambda t: t.update(extra=torch.zeros(1)))
    assert [d.kind for d in checkpoint.check()] == ["unexpected"]
    checkpoint.verify()


def test_a_file_without_talker_does_not_speak_whatever_its_config_says(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)

    def mute(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(("talker.", "token2wav."))]:
            del tensors[name]

    checkpoint = rewrite(tmp_path, mute)
    assert checkpoint.raw["enable_audio_output"] and not checkpoint.config.speaks
    assert checkpoint.check() == []


def test_single_linears_may_be_packed_or_not(tmp_path: Path) -> None:
    # The list of modules that were not converted is not asked: the file is.
    make_checkpoint(tmp_path, awq=True)
    plain = load_file(make_checkpoint(tmp_path / "plain", awq="dequantized") / "model.safetensors")

    def unpack_one(tensors: dict[str, torch.Tensor]) -> None:
        for kind in ("qweight", "qzeros", "scales"):
            del tensors[f"{UP}.{kind}"]
        tensors[f"{UP}.weight"] = plain[f"{UP}.weight"]

    checkpoint = rewrite(tmp_path, unpack_one)
    assert not checkpoint.quantized(UP) and checkpoint.quantized(UP.replace(".0.", ".1."))
    assert checkpoint.check() == []


def test_half_a_packed_linear_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, awq=True)
    checkpoint = rewrite(tmp_path, lambda tensors: tensors.pop(f"{UP}.scales"))
    assert checkpoint.check() == [Difference("missing", f"{UP}.scales", wanted="[2, 512]")]


def test_scales_in_bfloat16_are_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, awq=True)
    name = f"{UP}.scales"
    assert rewrite(tmp_path, lambda t: t.update({name: t[name].bfloat16()})).check() == []
    worse = rewrite(tmp_path, lambda t: t.update({name: t[name].float()})).check()
    assert worse == [Difference("type", name, "F32", "F16 or BF16")]


def test_the_old_place_of_the_packing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, awq=True, group_size=64)
    change_json(tmp_path / "config.json", lambda raw: raw.pop("quantization_config"))
    with pytest.raises(CheckpointError, match=r"4-bit weights.*no quantization_config"):
        resolve(tmp_path)
    old = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(old))
    checkpoint = resolve(tmp_path)
    assert checkpoint.config.quant is not None and checkpoint.config.quant.group_size == 64
    assert checkpoint.check() == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"group_size": 16}, "groups of 16"),
        ({"bits": 8}, "8 bits"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"version": "gemv"}, "gemv"),
    ],
)
def test_a_packing_that_is_not_read(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    make_checkpoint(tmp_path, awq=True)
    change_json(tmp_path / "config.json", lambda raw: raw["quantization_config"].update(change))
    with pytest.raises(CheckpointError, match=problem) as caught:
        resolve(tmp_path)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("config.json", None, "is no checkpoint"),
        ("config.json", b"{", "is no JSON"),
        ("config.json", b"\xff\xfe\x00", "is no JSON"),
        ("config.json", b"[1]", "no JSON object"),
        ("config.json", b'{"model_type": "qwen2"}', "model_type 'qwen2'"),
        ("config.json", b'{"model_type": "qwen2_5_omni", "thinker_config": 3}', "understood"),
        ("model.safetensors", None, "is no checkpoint"),
        ("model.safetensors", b"", "model.safetensors"),
        ("model.safetensors", struct.pack("<Q", 1 << 60), "model.safetensors"),
    ],
)
def test_a_damaged_folder(tmp_path: Path, file: str, content: bytes | None, problem: str) -> None:
    make_checkpoint(tmp_path, speech=False)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=problem) as caught:
        resolve(tmp_path)
    assert (
        "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    ) or "model_type" in str(caught.value)


def test_a_truncated_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(os.path.getsize(tmp_path / "model.safetensors") - 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        resolve(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        resolve(tmp_path)


def test_how_replies_end(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    saved, config = tmp_path / "generation_config.json", tmp_path / "config.json"
    change_json(saved, lambda raw: raw.update(eos_token_id=[7, 8], talker_max_new_tokens=0))
    defaults = resolve(tmp_path).generation
    # As in transformers, the Thinker's own configuration comes first.
    assert defaults.eos_token_ids == (special_ids()["<|im_end|>"],)
    assert defaults.max_codes == 4096
    change_json(config, lambda raw: raw["thinker_config"].pop("eos_token_id"))
    assert resolve(tmp_path).generation.eos_token_ids == (7, 8)
    saved.unlink()
    defaults = resolve(tmp_path).generation
    assert defaults.eos_token_ids == (special_ids()["<|im_end|>"],)
    assert defaults.max_new_tokens is None and defaults.max_codes == 4096


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/at-all", "a/b/c", "~/no-such-folder"])
def test_what_is_nowhere(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no folder.*pocket, Qwen2\.5-Omni-7B"):
        resolve(name)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(tmp_path / "model")


def test_what_nobody_publishes() -> None:
    with pytest.raises(CheckpointError, match=r"nobody publishes Qwen2\.5-Omni-3B-AWQ"):
        resolve("Qwen2.5-Omni-3B-AWQ")


def hub_cache(folder: Path, hub_id: str) -> Path:
    """A cache in which that model was downloaded, in the client's layout."""
    home = folder / f"models--{hub_id.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    return make_checkpoint(home / "snapshots" / commit)


@pytest.mark.parametrize("name", ["Qwen2.5-Omni-7B", "Qwen/Qwen2.5-Omni-7B", "qwen2.5-omni-7b"])
def test_a_hub_model_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = hub_cache(tmp_path, "Qwen/Qwen2.5-Omni-7B")
    checkpoint = resolve(name, offline=True)
    assert checkpoint.folder == folder and checkpoint.name == name
    assert checkpoint.check() == []
    with pytest.raises(CheckpointError, match=r"Qwen2.5-Omni-3B is not in the cache.*--offline"):
        resolve("Qwen2.5-Omni-3B", offline=True)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "accept its terms"),
        ("RepositoryNotFoundError", "has no model"),
        ("LocalEntryNotFoundError", "the hub cannot be reached: try again, or give the"),
        (None, r"cannot be downloaded \(no route"),
    ],
)
def test_what_can_go_wrong_at_the_hub(
    monkeypatch: pytest.MonkeyPatch, error: str | None, message: str
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    asked: list[dict[str, Any]] = []

    def refuse(hub_id: str, **options: Any) -> str:
        asked.append({"hub_id": hub_id, **options})
        if error is None:
            raise OSError("no route\nto host")
        kind = getattr(errors, error)
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve("somebody/Omni-finetune")
    assert "\n" not in str(caught.value) and "somebody/Omni-finetune" in str(caught.value)
    assert asked[0]["local_files_only"] is False
    assert asked[0]["allow_patterns"] == list(hub.FILES)


def test_opening_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from lowvram.checkpoint import resolve; c = resolve('pocket');"
        "c.check(); c.voices; c.generation; c.tokenizer(); c.preprocessor; c.stored_dtype;"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
