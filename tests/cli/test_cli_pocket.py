"""The whole command on the built-in model: what it writes agrees with what it reports."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from lowvram.cli.main import main

MEDIA = Path(__file__).resolve().parents[2] / "demos" / "media"
SHORT = ["--max-tokens", "3", "--max-speech", "0.3", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answer(capsys: Any, *argv: str, code: int = 0) -> dict[str, Any]:
    assert main([*argv, *SHORT, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_media_of_every_kind(capsys: Any) -> None:
    paths = (MEDIA / name for name in ("picture.png", "recording.flac", "clip.mp4"))
    flags = zip(("--image", "--audio", "--video"), map(str, paths), strict=True)
    found = answer(capsys, "-p", "What is this?", *[part for pair in flags for part in pair])
    names = "+".join(phase["name"] for phase in found["report"]["phases"]).split("+")
    assert names == ["vision", "audio", "prefill", "decode", "talk", "vocode"]
    for phase in found["report"]["phases"]:
        assert 0 < phase["measured_peak_bytes"] <= phase["predicted_peak_bytes"]
        assert phase["seconds"] > 0
    info = soundfile.info(found["audio_path"])
    assert info.duration == pytest.approx(found["audio_seconds"])
    assert found["audio_seconds"] == pytest.approx(0.3)
    assert 0 < found["report"]["first_text_s"] <= found["report"]["first_audio_s"]
    assert found["report"]["bytes_host_to_device"] > 0


def test_the_same_command_twice_and_another_seed(capsys: Any) -> None:
    texts = [
        answer(capsys, "-p", "hi", "-o", f"{name}.wav", "--temperature", "1", "--seed", seed)[
            "text"
        ]
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    ]
    a, b, c = (Path(f"{name}.wav").read_bytes() for name in "abc")
    assert texts[0] == texts[1]
    assert a == b
    assert a != c


def test_the_voice_changes_the_sound_and_not_the_words(capsys: Any) -> None:
    texts = [
        answer(capsys, "-p", "hi", "--voice", name, "-o", f"{name}.wav")["text"]
        for name in ("Chelsie", "Ethan")
    ]
    assert texts[0] == texts[1]
    assert Path("Chelsie.wav").read_bytes() != Path("Ethan.wav").read_bytes()


def test_stdout_carries_the_sound_of_the_file(capfdbinary: Any) -> None:
    assert main(["-p", "hi", "-o", "a.wav", *SHORT]) == 0
    words = capfdbinary.readouterr().out
    assert main(["-p", "hi", "-o", "-", *SHORT]) == 0
    out, err = capfdbinary.readouterr()
    assert words in err
    piped, _ = soundfile.read(io.BytesIO(out), dtype="int16")
    written, _ = soundfile.read("a.wav", dtype="int16")
    assert np.array_equal(piped, written)


def test_without_speech_no_talker_is_planned(capsys: Any) -> None:
    found = answer(capsys, "-p", "hi", "--no-speech")
    assert [phase["name"] for phase in found["plan"]["phases"]] == ["prefill", "decode"]
    assert found["plan"]["residency"]["talker"] == "unused"
    assert list(Path().iterdir()) == []


def test_plan_says_what_run_does(capsys: Any) -> None:
    picture = str(MEDIA / "picture.png")
    question = ["-p", "hi", "--image", picture, "--max-memory", "1GiB", "--system", "Short."]
    ran = answer(capsys, *question)["plan"]
    planned = answer(capsys, "plan", *question)
    assert planned["phases"] == ran["phases"]
    assert planned["budget_bytes"] == ran["budget_bytes"] == 2**30


def test_plan_and_run_take_the_same_defaults(capsys: Any) -> None:
    found = []
    for verb in ("run", "plan"):
        assert main([verb, "-p", "hi", "--no-speech", "--max-memory", "1GiB", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    ran, planned = found
    assert planned["phases"] == ran["plan"]["phases"]


def test_the_plan_as_a_table(capsys: Any) -> None:
    assert main(["plan", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("pocket on cpu, ")
    assert "prefill" in out
    assert err == ""


def test_what_does_not_fit(capsys: Any) -> None:
    for verb in ("run", "plan"):
        assert main([verb, "-p", "hi", "--max-memory", "8MiB", *SHORT, "--json"]) == 3
        out, err = capsys.readouterr()
        assert json.loads(out)["fits"] is False
        assert err.startswith("lowvram-demo: error: does not fit in 8 MiB: ")
        assert err.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_the_smallest_budget_that_is_named_would_do(capsys: Any) -> None:
    refused = answer(capsys, "plan", "-p", "hi", "--max-memory", "8MiB", code=3)
    least = refused["minimum_budget_bytes"]
    assert answer(capsys, "-p", "hi", "--max-memory", str(least))["fits"] is True
    answer(capsys, "plan", "-p", "hi", "--max-memory", str(least - 1), code=3)


def make_files() -> None:
    """Media that fail, each in a way of its own."""
    Path("empty.png").touch()
    Path("text.wav").write_text("no sound at all\n" * 100)
    Path("cut.png").write_bytes((MEDIA / "picture.png").read_bytes()[:200])
    Path("cut.mp4").write_bytes((MEDIA / "clip.mp4").read_bytes()[:2000])
    soundfile.write("sound.wav", np.zeros(1600), 16_000)
    Path("folder").mkdir()


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--image", "none.png"], 1, "none.png: "),
        (["--image", "folder"], 1, "folder: "),
        (["--image", "empty.png"], 1, "empty.png: "),
        (["--image", "text.wav"], 1, "text.wav: "),
        (["--audio", "text.wav"], 1, "text.wav: "),
        (["--audio", "none.wav"], 1, "none.wav: "),
        (["--video", "cut.mp4"], 1, "cut.mp4: "),
        (["--video", "sound.wav"], 1, "sound.wav: has no video track"),
        (["-m", "folder"], 1, "folder is no checkpoint"),
        (["-m", "none", "--offline"], 1, "none "),
        (["--speaker", "Nobody"], 2, "unknown voice 'Nobody'"),
        (["--max-memory", "900TiB"], 2, "--max-memory 900 TiB is more than cpu has"),
        (["--max-tokens", "50000"], 2, "the prompt takes "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_bad_input_is_one_line(
    capsys: Any, verb: str, argv: list[str], code: int, message: str
) -> None:
    make_files()
    before = sorted(Path().iterdir())
    assert main([verb, "-p", "hi", *SHORT, *argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"lowvram-demo: error: {message}")
    assert err.count("\n") == 1
    assert sorted(Path().iterdir()) == before


def test_a_picture_that_ends_early_is_found_when_it_is_read(capsys: Any) -> None:
    make_files()
    assert main(["-p", "hi", "--image", "cut.png", *SHORT]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lowvram-demo: error: cut.png: ")
    assert err.count("\n") == 1
    assert not Path("lowvram.wav").exists()


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P", "L", "1"])
def test_odd_pictures_are_answered(capsys: Any, mode: str) -> None:
    Image.new(mode, (70, 40)).save("odd.png")
    assert main(["-p", "hi", "--image", "odd.png", "--no-speech", "-q", *SHORT]) == 0
    assert capsys.readouterr().err == ""


def test_a_chat_over_two_turns(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    picture = MEDIA / "picture.png"
    lines = iter([f"/image {picture}", "what is it?", "/save talk.json", "and now?"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, "/exit"))
    Path("talk").mkdir()
    assert main(["chat", "-o", "talk", *SHORT]) == 0
    replies = capsys.readouterr().out.splitlines()
    assert len(replies) == 2
    saved = json.loads(Path("talk.json").read_text())
    assert [message["role"] for message in saved] == ["user", "assistant"]
    assert saved[1]["content"] == replies[0]
    assert sorted(p.name for p in Path("talk").iterdir()) == ["reply-1.wav", "reply-2.wav"]
