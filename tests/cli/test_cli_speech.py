"""The flags of speech: a given text, and pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile

from lowvram.cli.main import main


def test_a_given_text_is_spoken(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "said.wav"
    asked = ["--speech-only", "It rains.", "--max-speech", "0.8", "-o", str(path), "--json", "-q"]
    assert main(["run", *asked]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == "It rains." and found["audio_seconds"] == pytest.approx(0.8)
    assert soundfile.info(path).frames == 0.8 * 24_000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--speech-only", " "], "--speech-only is empty"),
        (["--speech-only", "Hi", "--no-speech"], "exclude each other"),
        (["--speech-only", "-", "-p", "-"], "both want standard input"),
    ],
)
def test_a_text_that_cannot_be_spoken(flags: list[str], said: str, capsys: Any) -> None:
    assert main(["run", *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pieces", "2,x"], "'2,x' is no list of numbers"),
        (["--pieces", "2,0"], "wanted one or more blocks in each"),
        (["--look-ahead", "-1"], "look_ahead is -1"),
    ],
)
def test_pieces_that_are_none(flags: list[str], said: str, capsys: Any) -> None:
    assert main(["run", "-p", "hi", *flags]) == 2
    assert said in capsys.readouterr().err
