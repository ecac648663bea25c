"""The media that come with the project."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from conversation_files import prepared, user

from lowvram.conversation import Tokenizer

FOLDER = Path(__file__).parents[2] / "demos" / "media"


def conversation(folder: Path) -> list[dict[str, Any]]:
    return user(
        {"type": "image", "image": str(folder / "picture.png")},
        {"type": "audio", "audio": str(folder / "recording.flac")},
        {"type": "video", "video": str(folder / "clip.mp4")},
        {"type": "text", "text": "What is this?"},
    )


def test_measure_equals_prepare_on_the_demo_media(tokenizer: Tokenizer) -> None:
    prompt, shape = prepared(conversation(FOLDER), tokenizer)
    assert prompt.shape == shape
    assert shape.grids[1][0] == 4  # four seconds, a pair of frames each
    assert [item.seconds_per_grid for item in prompt.vision] == [0.0, 1.0]
    recording, track = shape.audio_frames
    assert 200 < recording < 400 and 398 <= track <= 404


def test_they_are_small() -> None:
    files = [path for path in FOLDER.iterdir() if path.suffix != ".py" and path.is_file()]
    assert {path.suffix for path in files} == {".png", ".flac", ".mp4"}
    assert sum(path.stat().st_size for path in files) < 250_000


def test_the_script_beside_them_makes_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Other builds of the encoders may give other bytes, but not another length or size."""
    spec = importlib.util.spec_from_file_location("make_media", FOLDER / "make_media.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    maker.make(tmp_path)
    made, _ = prepared(conversation(tmp_path), tokenizer)
    kept, _ = prepared(conversation(FOLDER), tokenizer)
    assert made.shape == kept.shape
    assert (made.vision[0].frames == kept.vision[0].frames).all()
