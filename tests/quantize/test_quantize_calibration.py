"""Conversations from folders, files and the set that is made here, up to what layer 0 sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from lowvram import LowVRAMOmni
from lowvram.checkpoint import Checkpoint, resolve
from lowvram.conversation import MediaSettings, prepare
from lowvram.errors import UsageError
from lowvram.models.text import Decoder
from lowvram.offload import open_device
from lowvram.quantize.builtin import builtin_conversation, draw, film, ring, speak
from lowvram.quantize.calibration import builtin_set, find_calibration
from lowvram.quantize.front import Calibration, Front, held_out
from lowvram.quantize.settings import QuantizeSettings

SETTINGS = QuantizeSettings(device="cpu", samples=8, seq_len=600)


@pytest.fixture
def checkpoint(source: Path) -> Iterator[Checkpoint]:
    found = resolve(source)
    with found.store:
        yield found


def calibrate(
    checkpoint: Checkpoint, settings: QuantizeSettings, folder: Path, notes: list[str]
) -> Calibration:
    front = Front(checkpoint, open_device("cpu"), torch.bfloat16, settings.seq_len, notes.append)
    found = find_calibration(settings)
    return front.run(found, settings, budget=1 << 30, folder=folder / "spill")


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with a picture, a sound, a text, what is broken, and what is none of these."""
    folder = tmp_path / "media"
    (folder / "deeper").mkdir(parents=True)
    random = np.random.default_rng(0)
    Image.fromarray(draw(random)).save(folder / "picture.png")
    soundfile.write(folder / "deeper" / "sound.WAV", ring(random, 0.5), 16_000)
    (folder / "text.txt").write_text("Guten Tag, wie geht es?")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "program.exe").write_bytes(b"MZ")
    return folder


def test_a_folder_gives_what_can_be_read_and_counts_the_rest(
    checkpoint: Checkpoint, media: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    settings = replace(SETTINGS, calibration=str(media))
    found = calibrate(checkpoint, settings, tmp_path, notes)
    assert len(found.inputs) == 3
    assert found.skipped == 1
    assert len(notes) == 1 and "broken.jpg" in notes[0]
    assert all(count > 0 for count in found.tokens.values())


def test_lines_are_conversations_and_paths_start_at_their_file(
    checkpoint: Checkpoint, media: Path, tmp_path: Path
) -> None:
    picture = {"type": "image", "image": "picture.png"}
    lines = [
        json.dumps(user(picture, words("What is this?"))),
        json.dumps({"messages": [*user(words("Hello")), {"role": "assistant", "content": "Hi"}]}),
        "",
        "{not json",
        json.dumps({"prompt": "no conversation"}),
        json.dumps([{"role": "nobody", "content": "x"}]),
    ]
    (media / "set.jsonl").write_text("\n".join(lines))
    notes: list[str] = []
    settings = replace(SETTINGS, calibration=str(media / "set.jsonl"))
    found = calibrate(checkpoint, settings, tmp_path, notes)
    assert len(found.inputs) == 2 and found.tokens["vision"] > 0
    assert found.skipped == 3
    assert sorted(note.split(",")[1] for note in notes) == [" line 4", " line 5", " line 6"]


def test_the_inputs_are_those_of_the_first_layer_in_use(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against what the engine feeds its decoder for the same conversation."""
    picture, sound = draw(np.random.default_rng(1)), ring(np.random.default_rng(2), 1.0)
    conversation = user(
        {"type": "image", "image": picture}, {"type": "audio", "audio": sound}, words("Well?")
    )
    fed: list[torch.Tensor] = []
    real = Decoder.forward
    monkeypatch.setattr(
        Decoder, "forward", lambda self, x, *rest: (fed.append(x.clone()), real(self, x, *rest))[1]
    )
    with LowVRAMOmni.from_pretrained(checkpoint.folder, device="cpu", speech=False) as omni:
        omni.generate(conversation, max_new_tokens=1)
    monkeypatch.setattr(
        "lowvram.quantize.calibration.builtin_conversation", lambda index, seed: conversation
    )
    found = calibrate(checkpoint, replace(SETTINGS, samples=1), tmp_path, [])
    assert found.tokens["vision"] and found.tokens["audio"]
    assert torch.equal(found.inputs[0], fed[0][0])
    prompt = prepare(
        conversation,
        tokenizer=checkpoint.tokenizer(),
        config=checkpoint.config.thinker,
        settings=MediaSettings(),
        speech=False,
        preprocessor=checkpoint.preprocessor,
    )
    assert np.array_equal(found.positions[0], prompt.positions)


def test_long_conversations_are_cut(checkpoint: Checkpoint, tmp_path: Path) -> None:
    long = calibrate(checkpoint, replace(SETTINGS, samples=2), tmp_path, [])
    short = calibrate(checkpoint, replace(SETTINGS, samples=2, seq_len=32), tmp_path, [])
    for index in range(2):
        assert short.inputs[index].shape[0] == short.positions[index].shape[1] == 32
        if index == 0:  # the picture of the second is smaller where there is less room
            assert torch.equal(short.inputs[0], long.inputs[0][:32])


def test_the_built_in_set_has_every_kind_and_is_the_same_each_time() -> None:
    items = [builtin_conversation(index, 0) for index in range(16)]
    kinds = {part["type"] for item in items for part in item[-1]["content"]}
    assert kinds == {"text", "image", "audio", "video"}
    assert sum(item[0]["role"] == "system" for item in items) == 8
    again = builtin_conversation(1, 0)[0]["content"][0]["image"]
    first = items[1][0]["content"][0]["image"]
    other = builtin_conversation(1, 1)[0]["content"][0]["image"]
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_what_is_drawn_and_sounded_is_sane() -> None:
    random = np.random.default_rng(0)
    assert film(random).shape == (4, 112, 140, 3) and film(random).dtype == np.uint8
    for sound, count in ((speak(random, 2.0), 32_000), (ring(random, 2.0), 32_000)):
        assert sound.shape == (count,) and sound.dtype == np.float32
        assert 0.05 < np.abs(sound).max() <= 1 and np.isfinite(sound).all()


def test_sets_are_told_apart(media: Path) -> None:
    settings = replace(SETTINGS, calibration=str(media))
    before = find_calibration(settings).digest
    assert find_calibration(settings).digest == before
    (media / "text.txt").write_text("Guten Tag, wie geht's?!")
    assert find_calibration(settings).digest != before
    assert builtin_set(4, 0, first=0).digest != builtin_set(5, 0, first=0).digest


def test_an_eighth_is_held_out_and_never_all() -> None:
    assert held_out(1, 0) == frozenset()
    assert len(held_out(2, 0)) == 1
    assert len(held_out(32, 0)) == 4
    assert held_out(32, 0) != held_out(32, 1)


def test_files_that_are_no_set(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("a,b")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, match in (
        ("notes.csv", "is no .jsonl file"),
        ("binary.jsonl", "cannot be read as UTF-8"),
        ("empty.jsonl", "holds no conversations"),
    ):
        with pytest.raises(UsageError, match=match):
            find_calibration(replace(SETTINGS, calibration=str(tmp_path / name)))
