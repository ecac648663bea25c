"""`run`: where text and speech go, what is printed when, and what a failure leaves behind."""

from __future__ import annotations

import io
import json
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from lowvram.cli.main import main
from lowvram.cli.wav import WavFile
from lowvram.errors import (
    CheckpointError,
    DeviceError,
    DoesNotFitError,
    LowVRAMError,
    MediaError,
    UsageError,
)

NOISE = "note: the built-in model is tiny and untrained: its words and voice are noise\n"
TIMES = "first text 0.25 s; first audio 0.50 s; total 1.50 s\n"


def left_behind() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_words_on_stdout_and_speech_in_the_usual_file(engine: Any, capsys: Any) -> None:
    assert main(["-p", "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello there\n"
    assert err == f"{NOISE}speech: lowvram.wav (0.20 s)\n{TIMES}"
    assert left_behind() == ["lowvram.wav"]
    info = soundfile.info("lowvram.wav")
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (
        24_000,
        1,
        "PCM_16",
        4800,
    )
    assert engine.closed == 1


def test_speech_keeps_the_samples(engine: Any) -> None:
    assert main(["-p", "hi", "-o", "out.wav"]) == 0
    samples, _ = soundfile.read("out.wav", dtype="int16")
    tone = np.rint(np.linspace(-32767, 32767, 2400, dtype=np.float32))
    assert np.array_equal(samples, np.concatenate([tone, tone]))


def test_a_greeting_is_asked_when_nothing_is(engine: Any) -> None:
    assert main([]) == 0
    assert engine.asked[0]["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "Hello! Who are you?"}]}
    ]


def test_flags_become_messages_and_options(engine: Any, capsys: Any) -> None:
    flags = "--image a.png --image b.png --video c.mp4 --audio d.wav --system Short. --fps 1.5"
    drawing = "--temperature 0.7 --top-p 0.9 --top-k 5 --seed 9 --max-tokens 7 --max-speech 2.5"
    sampling = "--max-frames 4 --min-pixels 100 --max-pixels 200 --no-audio-in-video --solver rk4"
    place = "--voice Ethan --max-memory 8GiB --device cuda:1 --dtype bfloat16 --allow head8,kv8"
    argv = f"run -p hi {flags} {drawing} {sampling} {place} --offline -q".split()
    assert main(argv) == 0
    assert engine.asked == [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "a.png"},
                        {"type": "image", "image": "b.png"},
                        {"type": "audio", "audio": "d.wav"},
                        {"type": "video", "video": "c.mp4"},
                        {"type": "text", "text": "hi"},
                    ],
                }
            ],
            "speaker": "Ethan",
            "max_new_tokens": 7,
            "max_speech_seconds": 2.5,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 5,
            "solver": "rk4",
            "whole_speech": False,
            "pieces": (2, 2, 4, 8),
            "look_ahead": 1,
            "say": None,
            "system": "Short.",
            "fps": 1.5,
            "max_frames": 4,
            "min_pixels": 100,
            "max_pixels": 200,
            "use_audio_in_video": False,
        }
    ]
    request = engine.opened[0]
    assert (request.seed, request.device, request.dtype) == (9, "cuda:1", "bfloat16")
    assert (request.max_memory, request.allow, request.offline) == (
        8 * 2**30,
        ("head8", "kv8"),
        True,
    )
    assert capsys.readouterr().err == ""


def test_the_prompt_from_standard_input(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert main(["-p", "-"]) == 0
    content = engine.asked[0]["messages"][0]["content"]
    assert content == [{"type": "text", "text": "from a pipe"}]


def test_json_is_one_object_on_stdout(engine: Any, capsys: Any) -> None:
    assert main(["-p", "hi", "--json"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert (answer["text"], answer["audio_path"]) == ("Hello there", "lowvram.wav")
    assert answer["audio_seconds"] == pytest.approx(0.2)
    assert answer["fits"] is True
    assert answer["plan"]["phases"][0]["name"] == "decode"
    report = answer["report"]
    assert report["phases"] == [
        {
            "name": "decode",
            "seconds": 0.5,
            "predicted_peak_bytes": 2**30,
            "measured_peak_bytes": 2**29,
        }
    ]
    marks = (report["first_text_s"], report["first_audio_s"], report["bytes_host_to_device"])
    assert marks == (0.25, 0.5, 12)
    assert "Hello" not in err


@pytest.mark.parametrize("verb", ["run", "chat"])
def test_speech_that_had_to_end_is_told(
    engine: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt="": "/exit")
    engine.cut_off = True
    assert main([verb, "-p", "hi", "-o", "a.wav"]) == 0
    assert " (0.20 s, cut off there; see --max-speech)\n" in capsys.readouterr().err


def test_no_speech_writes_no_file(engine: Any, capsys: Any) -> None:
    assert main(["-p", "hi", "--no-speech", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["audio_path"], answer["audio_seconds"]) == (None, 0.0)
    assert left_behind() == []
    assert engine.opened[0].speech is False


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_reply_without_sound_is_a_file_without_samples(
    engine: Any, capsys: Any, before: bytes | None
) -> None:
    if before is not None:
        Path("lowvram.wav").write_bytes(before)
    engine.script = ["ok"]
    assert main(["-p", "hi", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["audio_path"], answer["audio_seconds"]) == ("lowvram.wav", 0.0)
    assert soundfile.info("lowvram.wav").frames == 0
    with wave.open("lowvram.wav") as file:
        assert (file.getnframes(), file.getframerate(), file.getsampwidth()) == (0, 24_000, 2)
    assert left_behind() == ["lowvram.wav"]


def test_a_stream_without_sound_is_a_header(engine: Any, capfdbinary: Any) -> None:
    engine.script = ["ok"]
    assert main(["-p", "hi", "-o", "-"]) == 0
    out, _ = capfdbinary.readouterr()
    assert (out[:4], out[36:40], len(out)) == (b"RIFF", b"data", 44)
    assert len(soundfile.read(io.BytesIO(out))[0]) == 0


def test_speech_on_stdout_and_words_on_stderr(engine: Any, capfdbinary: Any) -> None:
    assert main(["-p", "hi", "-o", "-"]) == 0
    out, err = capfdbinary.readouterr()
    assert b"Hello there\n" in err
    assert (out[:4], out[36:40], len(out)) == (b"RIFF", b"data", 44 + 2 * 4800)
    samples, rate = soundfile.read(io.BytesIO(out), dtype="int16")
    assert rate == 24_000
    assert samples[[0, 2399, 2400]].tolist() == [-32767, 32767, -32767]
    assert left_behind() == []


def test_speech_into_a_device_replaces_no_device(engine: Any) -> None:
    assert main(["-p", "hi", "-o", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()


def test_verbose_shows_plan_and_report(engine: Any, capsys: Any) -> None:
    assert main(["-p", "hi", "-v"]) == 0
    err = capsys.readouterr().err
    assert "pocket on cpu, float32: fits in 2 GiB" in err
    assert "of predicted" in err


def test_quiet_says_nothing(engine: Any, capsys: Any) -> None:
    assert main(["-p", "hi", "-q"]) == 0
    assert capsys.readouterr() == ("Hello there\n", "")


def test_a_model_without_a_voice_answers_in_text(engine: Any, capsys: Any) -> None:
    engine.speaks = False
    assert main(["-p", "hi", "-m", "folder"]) == 0
    assert "note: folder does not speak: text only\n" in capsys.readouterr().err
    assert engine.opened[0].speech is False
    assert left_behind() == []


def test_a_model_without_a_voice_speaks_no_given_text(engine: Any, capsys: Any) -> None:
    engine.speaks = False
    assert main(["--speech-only", "hi", "-m", "folder"]) == 2
    said = "lowvram-demo: error: --speech-only: folder does not speak; use one that does\n"
    assert capsys.readouterr().err == said and engine.opened == []


def test_a_report_that_cannot_be_written_costs_nothing_else(
    engine: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(report: Any, path: str) -> None:
        raise LowVRAMError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("lowvram.cli.run.write_report", full)
    assert main(["-p", "hi", "--json", "--report", "memory.png"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["text"] == "Hello there" and "speech: lowvram.wav (0.20 s)\n" in err
    assert left_behind() == ["lowvram.wav"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MediaError("a.wav is empty"), 1),
        (CheckpointError("shard 2 is missing"), 1),
        (UsageError("no such thing"), 2),
        (DeviceError("torch_npu is not installed"), 2),
        (DoesNotFitError("does not fit in 1 GiB"), 3),
        (LowVRAMError("two\n  lines"), 1),
        (FileNotFoundError(2, "No such file or directory", "x.bin"), 1),
        (ModuleNotFoundError("No module named 'soxr'", name="soxr"), 1),
        (ZeroDivisionError("division by zero"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
@pytest.mark.parametrize("when", ["before", "speaking"])
def test_a_failure_is_one_line_and_leaves_nothing(
    engine: Any, capsys: Any, error: BaseException, code: int, when: str
) -> None:
    engine.script = ["Hello", np.ones(100, np.float32), error] if when == "speaking" else [error]
    Path("old.wav").write_bytes(b"kept")
    assert main(["-p", "hi", "-o", "old.wav"]) == code
    lines = capsys.readouterr().err.splitlines()
    if when == "speaking":
        assert f"{lines.pop(0)}\n" == NOISE
    assert len(lines) == 1
    if code == 130:
        spoken = "; 0.0 s of speech are in old.wav" if when == "speaking" else ""
        assert lines == [f"lowvram-demo: interrupted{spoken}"]
    else:
        said = {
            "FileNotFoundError": "x.bin: No such file or directory",
            "ModuleNotFoundError": "the package soxr is not installed; "
            "lowvram-demo doctor says how to get it",
            "ZeroDivisionError": "unexpected ZeroDivisionError: division by zero "
            "(-vv shows where it came from)",
            "LowVRAMError": "two lines",
        }.get(type(error).__name__, str(error))
        assert lines == [f"lowvram-demo: error: {said}"]
        assert Path("old.wav").read_bytes() == b"kept"
    assert left_behind() == ["old.wav"]
    assert engine.closed == 1


def test_a_refusal_is_an_object_too(engine: Any, capsys: Any) -> None:
    engine.refuse()
    assert main(["-p", "hi", "--json"]) == 3
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert (answer["fits"], answer["text"], answer["report"]) == (False, None, None)
    assert answer["plan"]["fits"] is False
    assert answer["error"] == "does not fit in 2 GiB"
    assert err.splitlines()[-1] == "lowvram-demo: error: does not fit in 2 GiB"
    assert left_behind() == []


@pytest.mark.parametrize(
    ("output", "code", "message"),
    [
        ("missing/out.wav", 1, "cannot write missing/out.wav: No such file or directory; "),
        (".", 1, "cannot write .: Is a directory; "),
        ("file/out.wav", 1, "cannot write file/out.wav: Not a directory; "),
        ("out.mp3", 2, "-o out.mp3: speech is written as WAV; wanted a name that ends in .wav"),
    ],
)
def test_an_output_that_cannot_be_is_found_before_the_work(
    engine: Any, capsys: Any, output: str, code: int, message: str
) -> None:
    Path("file").touch()
    assert main(["-p", "hi", "-o", output]) == code
    assert capsys.readouterr().err.startswith(f"lowvram-demo: error: {message}")
    assert engine.opened == []
    assert left_behind() == ["file"]


@pytest.mark.parametrize("flags", [["--audio", "lowvram.wav"], ["--video", "b.wav", "-o", "c.wav"]])
def test_speech_does_not_replace_what_is_read(engine: Any, capsys: Any, flags: list[str]) -> None:
    for name in ("lowvram.wav", "b.wav"):
        Path(name).write_bytes(b"mine")
    Path("c.wav").symlink_to("b.wav")
    assert main(["-p", "hi", *flags]) == 2
    said = "is read by this request, whose speech would take its place; choose another place"
    assert said in capsys.readouterr().err and engine.opened == []
    assert main(["-p", "hi", *flags, "-o", "d.wav"]) == 0
    assert {Path(name).read_bytes() for name in ("lowvram.wav", "b.wav")} == {b"mine"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-p", "hi", "--speaker", "Bob"], "unknown voice 'Bob'; known: Chelsie, Ethan"),
        (["-p", "hi", "-o", "-", "--json"], "-o - and --json both want standard output; "),
        (["-p", "hi", "-o", "x.wav", "--no-speech"], "-o x.wav and --no-speech exclude each other"),
        (["-m", "folder"], "nothing to answer; give -p TEXT, --image, --audio or --video"),
        (["-m", "folder", "-p", "  "], "nothing to answer; "),
        (["-p", "a\udcff"], "-p is not UTF-8 text: character 1 is none"),
    ],
)
def test_contradictions_are_found_before_the_work(
    engine: Any, capsys: Any, argv: list[str], message: str
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(f"lowvram-demo: error: {message}")
    assert engine.opened == []


def test_warnings_are_notes_of_one_line(engine: Any, capsys: Any) -> None:
    import warnings

    def words() -> Any:
        warnings.warn("--max-memory 9 GiB\n lowered", stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        yield from original([], {})

    original = engine.reply
    engine.reply = lambda messages, options: words()
    assert main(["-p", "hi", "-m", "folder"]) == 0
    assert capsys.readouterr().err.splitlines()[0] == "note: --max-memory 9 GiB lowered"


def test_a_sound_that_cannot_be_written_stops_the_work(
    engine: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    reply = engine.reply

    def watched(messages: Any, options: Any) -> Any:
        try:
            yield from reply(messages, options)
        finally:
            order.append(f"stopped, {engine.closed} closed")

    def full(sink: Any, samples: Any) -> None:
        raise LowVRAMError("cannot write lowvram.wav: the disk is full")

    engine.reply = watched
    monkeypatch.setattr(WavFile, "write", full)
    assert main(["-p", "hi"]) == 1
    assert order == ["stopped, 0 closed"]
    said = "lowvram-demo: error: cannot write lowvram.wav: the disk is full\n"
    assert capsys.readouterr().err.endswith(said)
