"""The voice file: written as torch writes it, listed without torch, and nothing in it is run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowvram.checkpoint import resolve
from lowvram.config import DiTConfig
from lowvram.errors import CheckpointError
from lowvram.pocket import make_checkpoint
from lowvram.voices import read_voice_infos, read_voices, write_voices


def test_voice_file_is_what_torch_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {
        name: {
            "bos_token": bos,
            "cond": rng.random((1, 7), dtype=np.float32),
            "ref_mel": rng.random((1, 11, 3), dtype=np.float32),
        }
        for name, bos in (("Chelsie", 151872), ("Ethan", 5))
    }
    path = tmp_path / "spk_dict.pt"
    write_voices(path, values)
    read = torch.load(path, weights_only=True)
    assert list(read) == ["Chelsie", "Ethan"]
    for name, fields in values.items():
        assert read[name]["bos_token"] == fields["bos_token"]
        for key in ("cond", "ref_mel"):
            assert read[name][key].dtype == torch.float32
            assert np.array_equal(read[name][key].numpy(), fields[key])
    config = DiTConfig(enc_emb_dim=7, mel_dim=3)
    assert [(v.name, v.frames) for v in read_voice_infos(path, config)] == [
        ("Chelsie", 11),
        ("Ethan", 11),
    ]
    assert read_voices(path, config)["Ethan"]["bos_token"] == 5


@pytest.mark.parametrize("zipped", [True, False])
def test_voices_saved_by_torch_in_either_layout(tmp_path: Path, zipped: bool) -> None:
    entry = {"bos_token": 3, "cond": torch.rand(1, 6), "ref_mel": torch.rand(1, 9, 4)}
    path = tmp_path / "spk_dict.pt"
    other = {**entry, "ref_mel": torch.rand(2, 9, 4, dtype=torch.float64)[:1], "note": "x"}
    torch.save({"One": entry, "Two": other}, path, _use_new_zipfile_serialization=zipped)
    infos = read_voice_infos(path, DiTConfig(enc_emb_dim=6, mel_dim=4))
    assert [(info.name, info.frames) for info in infos] == [("One", 9), ("Two", 9)]


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Path(os.environ["XDG_CACHE_HOME"]) / "owned"),)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"A": Malicious()}, "mkdir"),
        ({"A": {"bos_token": 1}}, "cond None"),
        ({"A": {"bos_token": -1, "cond": torch.zeros(1, 48)}}, "bos_token -1"),
        (
            {"A": {"bos_token": 1, "cond": torch.zeros(48), "ref_mel": torch.zeros(1, 9, 80)}},
            r"cond \[48\], wanted \[1, 48\]",
        ),
        (
            {"A": {"bos_token": 1, "cond": torch.zeros(1, 47), "ref_mel": torch.zeros(1, 9, 80)}},
            r"cond \[1, 47\], wanted \[1, 48\]",
        ),
        (
            {"A": {"bos_token": 1, "cond": torch.zeros(1, 48), "ref_mel": torch.zeros(1, 9, 81)}},
            r"ref_mel \[1, 9, 81\], wanted \[1, frames, 80\]",
        ),
        (
            {"A": {"bos_token": 1, "cond": torch.zeros(1, 48), "ref_mel": torch.zeros(1, 0, 80)}},
            "ref_mel",
        ),
        ({}, "no voices"),
        ([1, 2], "no voices"),
        ("plain pickle", "no file saved by torch"),
        (b"\x80\x02 nonsense", "cannot be read"),
        (b"", "cannot be read"),
        (None, "is missing"),
    ],
)
def test_a_bad_voice_file(tmp_path: Path, content: object, problem: str) -> None:
    folder = make_checkpoint(tmp_path)
    path = folder / "spk_dict.pt"
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    checkpoint = resolve(folder)
    with pytest.raises(CheckpointError, match=problem) as caught:
        _ = checkpoint.voices
    assert "\n" not in str(caught.value)
    assert not (Path(os.environ["XDG_CACHE_HOME"]) / "owned").exists()
    # A request without speech never looks at it.
    assert checkpoint.check(speech=False) == []
    assert [difference.kind for difference in checkpoint.check()] == ["voices"]
