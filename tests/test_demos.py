"""The demos run as they stand, on the built-in model and on the media beside them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile

DEMOS = Path(__file__).resolve().parents[1] / "demos"
LONGEST = 40


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> Any:
    """Runs a demo in an empty folder; gives what it printed to stdout and stderr."""

    def run_demo(name: str, *argv: str) -> tuple[str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *argv])
        runpy.run_path(str(DEMOS / name), run_name="__main__")
        out, err = capsys.readouterr()
        return out, err

    return run_demo


@pytest.mark.parametrize("demo", sorted(DEMOS.glob("*.py")), ids=lambda path: path.name)
def test_demos_are_short(demo: Path) -> None:
    assert len(demo.read_text().splitlines()) < LONGEST


def test_text_only_generation(run: Any) -> None:
    out, err = run("text_only_generation.py")
    assert len(out) > 2
    assert err == "The built-in model is untrained: its words are noise.\n"


def test_text_only_generation_takes_a_file(run: Any) -> None:
    shown, _ = run("text_only_generation.py", "--video", str(DEMOS / "media" / "clip.mp4"))
    default, _ = run("text_only_generation.py")
    assert shown != default


def test_voice_chatting(run: Any) -> None:
    recording = str(DEMOS / "media" / "recording.flac")
    out, err = run("voice_chatting.py", recording, recording)
    assert err == "The built-in model is untrained: its words and voice are noise.\n"
    first, second = (soundfile.info(f"reply-{turn}.wav") for turn in (1, 2))
    assert (first.samplerate, first.channels) == (24_000, 1)
    assert f"[reply-1.wav: {first.duration:.1f} s]" in out
    assert f"[reply-2.wav: {second.duration:.1f} s]" in out
