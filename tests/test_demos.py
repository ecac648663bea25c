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


MEDIA = DEMOS / "media"
BENCHMARKS = DEMOS.parent / "benchmarks"
SILENT = "The built-in model is untrained: its words are noise.\n"
SPOKEN = "The built-in model is untrained: its words and voice are noise.\n"
BRIEF = ("--max-speech", "0.4")


def test_the_media_stay_small() -> None:
    assert sum(path.stat().st_size for path in MEDIA.iterdir() if path.is_file()) < 500_000


def test_the_memory_they_need_is_what_the_planner_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from demo_memory import table

    again = "python benchmarks/demo_memory.py demos/README.md puts today's table there"
    assert table() in (DEMOS / "README.md").read_text(encoding="utf-8"), again


def test_text_only_generation(run: Any) -> None:
    default, err = run("text_only_generation.py")
    shown, _ = run("text_only_generation.py", "--video", str(MEDIA / "clip.mp4"))
    assert len(default) > 2 and shown != default
    assert err == SILENT
    alone, seen = (
        run("text_only_generation.py", "-p", "What do you notice?", *media)[0]
        for media in ((), ("--image", str(MEDIA / "picture.png")))
    )
    assert alone != default and seen == default


def test_universal_audio_understanding(run: Any) -> None:
    out, err = run("universal_audio_understanding.py")
    tasks = ("speech recognition: ", "speech translation: ", "vocal sound classification: ")
    assert all(task in out for task in tasks) and err == SILENT
    one, _ = run("universal_audio_understanding.py", "--task", tasks[1][:-2])
    assert one.startswith(tasks[1]) and one in out


@pytest.mark.parametrize(
    ("demo", "other"),
    [
        ("video_information_extracting.py", "screen.mp4"),
        ("screen_recording_interaction.py", "clip.mp4"),
    ],
)
def test_questions_about_a_video(run: Any, demo: str, other: str) -> None:
    out, err = run(demo)
    assert out.count("?\n") >= 1 and err == SILENT
    first = out.splitlines()[0]
    same, _ = run(demo, "-p", first)
    shown, _ = run(demo, str(MEDIA / other), "-p", first)
    assert out.startswith(same) and shown != same and shown.startswith(f"{first}\n")


@pytest.mark.parametrize("kind", ["music", "math"])
def test_speech_about_a_video(run: Any, kind: str) -> None:
    out, err = run(f"omni_chatting_for_{kind}.py", *BRIEF)
    assert "\n[" + f"{kind}.wav" in out and err == SPOKEN
    found = soundfile.info(f"{kind}.wav")
    assert (found.samplerate, found.channels, found.frames) == (24_000, 1, 9_600)
    shown, _ = run(f"omni_chatting_for_{kind}.py", *BRIEF, str(MEDIA / "clip.mp4"))
    assert shown != out


@pytest.mark.parametrize(
    ("demo", "reply", "rounds", "files", "fewer"),
    [
        ("voice_chatting.py", "reply", 2, ["recording.flac"] * 2, []),
        ("multi_round_omni_chatting.py", "round", 3, [], ["drawing-1.mp4"]),
    ],
)
def test_rounds_of_a_conversation(
    run: Any, demo: str, reply: str, rounds: int, files: list[str], fewer: list[str]
) -> None:
    out, err = run(demo, *BRIEF, *(str(MEDIA / file) for file in files))
    assert err == SPOKEN
    for number in range(1, rounds + 1):
        found = soundfile.info(f"{reply}-{number}.wav")
        assert (found.samplerate, found.channels, found.frames) == (24_000, 1, 9_600)
        assert f"[{reply}-{number}.wav: 0.4 s]" in out
    begun, _ = run(demo, *BRIEF, "-o", "new/folder", *(str(MEDIA / file) for file in fewer))
    begun = begun.replace("new/folder/", "")
    assert out.startswith(begun) and len(begun) < len(out)
    assert soundfile.info(f"new/folder/{reply}-1.wav").frames == 9_600
