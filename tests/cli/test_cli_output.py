"""The two streams: bars and half lines on a terminal, WAV headers, the one line of a failure."""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from lowvram.cli.main import main
from lowvram.cli.output import Console
from lowvram.cli.request import Request
from lowvram.cli.wav import WavFile, WavStream, pcm16
from lowvram.errors import LowVRAMError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show_on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """One screen that both streams are shown on. Called in the test, where pytest leaves it be."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = show_on_terminal(monkeypatch)
    console = Console(text=terminal)
    console.waiting("opening pocket")
    console.words("Hello")
    console.spoken(1.5)
    console.end_words()
    console.say("done")
    shown = terminal.getvalue()
    assert "opening pocket ..." in shown
    assert "Hello\n" in shown
    assert "speech 1.5 s" in shown or "speech 0.0 s" in shown
    assert shown.endswith("done\n")


def test_no_bars_elsewhere(capsys: Any) -> None:
    console = Console(text=sys.stdout)
    console.waiting("opening pocket")
    console.words("Hello")
    console.spoken(1.5)
    console.words(" again")
    console.end_words()
    assert capsys.readouterr() == ("Hello again\n", "")


def test_no_bars_when_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = show_on_terminal(monkeypatch)
    console = Console(text=terminal, quiet=True)
    console.waiting("opening pocket")
    console.words("Hello\n")
    console.spoken(1.5)
    console.end_words()
    assert terminal.getvalue() == "Hello\n"


def test_a_note_ends_a_half_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = show_on_terminal(monkeypatch)
    console = Console(text=terminal)
    console.words("Hel")
    console.say("note: careful")
    console.words("lo")
    console.end_words()
    assert terminal.getvalue() == "Hel\nnote: careful\nlo\n"


def test_an_error_ends_a_bar(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: Request) -> None:
        raise LowVRAMError("no room")

    monkeypatch.setattr(Request, "open_model", refuse)
    terminal = show_on_terminal(monkeypatch)
    assert main(["-p", "hi"]) == 1
    blank = "\r" + " " * len("opening pocket ...") + "\r"
    assert terminal.getvalue().endswith(f"{blank}lowvram-demo: error: no room\n")


def test_words_after_speech_share_no_line_with_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = show_on_terminal(monkeypatch)
    console = Console(text=terminal)
    console.words("a")
    console.spoken(1)
    console.words("b")
    before = terminal.getvalue()
    console.spoken(1)
    console.words("c")
    console.end_words()
    assert terminal.getvalue() == before + "c\n"


def test_speech_is_not_written_onto_a_terminal(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = show_on_terminal(monkeypatch)
    assert main(["-p", "hi", "-o", "-"]) == 2
    assert "standard output is a terminal" in terminal.getvalue()


def test_words_that_the_stream_cannot_show_are_escaped(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    engine.script = ["caf\u00e9 \U0001f600"]
    assert main(["-p", "hi"]) == 0
    sys.stdout.flush()
    assert raw.getvalue() == b"caf\\xe9 \\U0001f600\n"


@pytest.mark.parametrize("words", [0, 1])
def test_a_reader_that_has_left_is_one_line(
    engine: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: int
) -> None:
    read, write = os.pipe()
    engine.script = ["Hello", np.zeros(9, np.float32), " there"]
    engine.script.insert(2 * words, lambda: os.close(read))
    Path("lowvram.wav").write_bytes(b"old")
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["-p", "hi", "-q"]) == 1
        pipe.write("what is left in the buffer goes nowhere")
    said = "lowvram-demo: error: standard output was closed before the reply was complete\n"
    assert capsys.readouterr().err == said
    assert [path.read_bytes() for path in Path().iterdir()] == [b"old"]


def test_where_an_unexpected_error_came_from(engine: Any, capsys: Any) -> None:
    engine.script = [ZeroDivisionError("division by zero")]
    assert main(["-p", "hi", "-vv"]) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("lowvram-demo: error: unexpected ZeroDivisionError")


def test_another_thread_may_run_a_command(engine: Any) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["-p", "hi", "-q"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_samples_beyond_full_scale_are_clipped() -> None:
    loud = np.array([-2, -1, -0.5, 0, 0.5, 1, 2], np.float32)
    assert pcm16(loud).tolist() == [-32767, -32767, -16384, 0, 16384, 32767, 32767]


def test_a_file_and_a_stream_hold_the_same_samples(tmp_path: Path) -> None:
    pieces = np.split(np.sin(np.arange(3000, dtype=np.float32)), 3)
    file, buffer = WavFile(tmp_path / "a.wav"), io.BytesIO()
    stream = WavStream("-", buffer)
    for piece in pieces:
        file.write(piece)
        stream.write(piece)
    file.close()
    buffer.seek(0)
    ours, rate = soundfile.read(buffer, dtype="int16")
    theirs, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert rate == 24_000
    assert np.array_equal(ours, theirs)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.wav").symlink_to("real.wav")
    file = WavFile(tmp_path / "link.wav")
    file.write(np.zeros(10, np.float32))
    file.close()
    assert (tmp_path / "link.wav").is_symlink()
    assert soundfile.info(tmp_path / "real.wav").frames == 10


def test_a_folder_that_goes_away_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = WavFile(folder / "a.wav")
    folder.rmdir()
    with pytest.raises(LowVRAMError, match=r"cannot write .*a\.wav: .*choose another place"):
        file.write(np.zeros(10, np.float32))
