"""Checkpoints of every layout are answered; damaged ones are one line, before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowvram.cli.main import main
from lowvram.pocket import make_checkpoint

SHORT = ["-p", "hi", "--max-tokens", "2", "--max-speech", "0.1", "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole sharded checkpoint, to be copied."""
    return make_checkpoint(tmp_path_factory.mktemp("made") / "model", seed=5, shards=3)


@pytest.fixture
def model(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, tmp_path / "model"))


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def lose_a_shard(model: Path) -> None:
    shards(model)[1].unlink()


def cut_a_shard(model: Path) -> None:
    path = shards(model)[0]
    path.write_bytes(path.read_bytes()[:-1000])


def promise_a_longer_header(model: Path) -> None:
    path = shards(model)[2]
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


def edit_header(model: Path, old: str, new: str) -> None:
    """Same length, so that all else stays in place."""
    assert len(old) == len(new)
    for path in shards(model):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length].replace(old.encode(), new.encode(), 1)
        path.write_bytes(data[:8] + header + data[8 + length :])


def rename_a_tensor(model: Path) -> None:
    edit_header(model, "talker.codec_head.weight", "talker.codec_tail.weight")
    index = model / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("talker.codec_head.", "talker.codec_tail."))


def widen_the_vision_tower(model: Path) -> None:
    change_config(model, "thinker_config", "vision_config", intermediate_size=200)


def be_another_family(model: Path) -> None:
    change_config(model, model_type="llama")


def be_gptq(model: Path) -> None:
    change_config(model, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})


def be_awq_of_odd_groups(model: Path) -> None:
    change_config(model, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 48})


def be_awq_of_8_bits(model: Path) -> None:
    change_config(model, quantization_config={"quant_method": "awq", "bits": 8, "group_size": 128})


def spoil_the_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def lose_the_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def lose_the_voices(model: Path) -> None:
    (model / "spk_dict.pt").unlink()


def spoil_the_voices(model: Path) -> None:
    (model / "spk_dict.pt").write_bytes(b"no archive")


def change_config(model: Path, *path: str, **values: Any) -> None:
    file = model / "config.json"
    raw = json.loads(file.read_text())
    place = raw
    for key in path:
        place = place[key]
    place |= values
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_shard,
        cut_a_shard,
        promise_a_longer_header,
        rename_a_tensor,
        widen_the_vision_tower,
        be_another_family,
        be_gptq,
        be_awq_of_odd_groups,
        be_awq_of_8_bits,
        spoil_the_config,
        lose_the_tokenizer,
        lose_the_voices,
        spoil_the_voices,
    ],
    ids=lambda damage: damage.__name__,
)
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_damaged_checkpoint_is_one_line(
    model: Path, capsys: Any, verb: str, damage: Callable[[Path], None]
) -> None:
    damage(model)
    assert main([verb, "-m", "model", *SHORT]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lowvram-demo: error: ")
    assert err.count("\n") == 1
    assert "unexpected" not in err
    assert not Path("lowvram.wav").exists()


def test_without_a_talker_the_rest_answers(model: Path, capsys: Any) -> None:
    rename_a_tensor(model)
    assert main(["-m", "model", "--no-speech", *SHORT]) == 0
    assert len(capsys.readouterr().out) > 1


@pytest.mark.parametrize(
    "layout",
    [{}, {"awq": True}, {"awq": True, "shards": 2}, {"speech": False}, {"dtype": "float32"}],
    ids=str,
)
def test_every_layout_is_answered_and_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, layout: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "model", seed=5, **layout)
    assert main(["doctor", "-m", "model"]) == 0
    assert main(["-m", "model", *SHORT, "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert Path("lowvram.wav").exists() is layout.get("speech", True)
