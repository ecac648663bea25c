"""WAV files that open at every moment, and outputs that fail."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from lowvram.cli.main import main
from lowvram.cli.wav import WavFile, pcm16

NOISE = np.random.default_rng(1).uniform(-1, 1, 5_000).astype(np.float32)


def test_a_file_is_valid_while_it_grows(tmp_path: Path) -> None:
    sink = WavFile(tmp_path / "a.wav")
    assert list(tmp_path.iterdir()) == []
    for end in (1, 700, 5_000):
        begun = 0 if end == 1 else soundfile.info(tmp_path / "a.wav").frames
        sink.write(NOISE[begun:end])
        samples, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
        assert rate == 24_000 and np.array_equal(samples, pcm16(NOISE[:end]))
        assert (tmp_path / "a.wav").stat().st_size == 44 + 2 * end
    sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_what_was_there_comes_back_when_the_work_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.wav"
    target.write_bytes(b"old")
    link = tmp_path / "link.wav"
    link.symlink_to(target)
    sink = WavFile(link)
    sink.write(NOISE)
    assert soundfile.info(target).frames == len(NOISE)
    sink.discard()
    assert target.read_bytes() == b"old" and link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "link.wav"]


def test_a_killed_process_leaves_a_file_that_opens(tmp_path: Path) -> None:
    work = (
        "import numpy as np, os, pathlib, signal, sys\n"
        "from lowvram.cli.wav import WavFile\n"
        "sink = WavFile(pathlib.Path(sys.argv[1]))\n"
        "sink.write(np.zeros(300)); sink.write(np.ones(200))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    place = tmp_path / "a.wav"
    done = subprocess.run([sys.executable, "-c", work, str(place)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert soundfile.info(place).frames == 500


@contextmanager
def room_for(nbytes: int) -> Iterator[None]:
    """Files of this process can be no longer, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize(
    ("room", "kept", "told"),
    [
        (20, None, ""),
        (9_000, None, ""),
        (15_000, 5_000, "its first 0.2 s are kept; "),
        (20_100, 10_000, "its first 0.4 s are kept; "),
    ],
)
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_full_disk_is_one_line_and_keeps_what_it_took(
    engine: Any, capsys: Any, room: int, kept: int | None, told: str, before: bytes | None
) -> None:
    if before is not None:
        Path("lowvram.wav").write_bytes(before)
    engine.script = ["Hello", NOISE, NOISE, NOISE]
    with room_for(room):
        assert main(["-p", "hi", "-q"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    said = f"cannot write lowvram.wav: File too large; {told}choose another place with -o"
    assert line == f"lowvram-demo: error: {said}"
    if kept is None:
        left = [] if before is None else ["lowvram.wav"]
        assert before is None or Path("lowvram.wav").read_bytes() == before
    else:
        left = ["lowvram.wav"]
        samples, _ = soundfile.read("lowvram.wav", dtype="int16")
        assert np.array_equal(samples, pcm16(np.tile(NOISE, 2)[:kept]))
        assert Path("lowvram.wav").stat().st_size == 44 + 2 * kept
        with wave.open("lowvram.wav") as file:
            assert file.readframes(kept + 1) == samples.tobytes()
    assert [path.name for path in Path().iterdir()] == left


def test_an_interruption_while_the_file_takes_its_place(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("lowvram.wav").write_bytes(b"old")
    replace, calls = Path.replace, []

    def interrupted(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    engine.script = ["Hello", NOISE]
    assert main(["-p", "hi"]) == 130
    assert [path.read_bytes() for path in Path().iterdir()] == [b"old"]


def test_no_room_for_a_header_is_one_line(engine: Any, capsys: Any) -> None:
    engine.script = ["ok"]
    with room_for(20):
        assert main(["-p", "hi", "-q"]) == 1
    said = "cannot write lowvram.wav: File too large; choose another place with -o"
    assert capsys.readouterr().err == f"lowvram-demo: error: {said}\n"
    assert list(Path().iterdir()) == []


def test_a_device_that_takes_nothing_is_one_line(tmp_path: Path) -> None:
    done = run_stand_in(tmp_path, "run", "-p", "hi", "-q", "-o", "/dev/full", stdout="/dev/null")
    assert done == (1, "lowvram-demo: error: /dev/full: No space left on device\n")


@pytest.mark.parametrize("flags", [("--no-speech",), ("--no-speech", "--json"), ("-o", "-")])
def test_a_full_standard_output_is_named(tmp_path: Path, flags: tuple[str, ...]) -> None:
    done = run_stand_in(tmp_path, "run", "-p", "hi", "-q", *flags, stdout="/dev/full")
    assert done == (1, "lowvram-demo: error: standard output: No space left on device\n")
    assert list(tmp_path.iterdir()) == []


STAND_IN = """
import sys
import numpy as np
sys.path[:0] = {paths!r}
from cli.conftest import Engine, StandIn
from lowvram.cli.main import main
from lowvram.cli.request import Request
engine = Engine()
Request.find_checkpoint = lambda request: engine.checkpoint()
Request.open_model = lambda request: engine.opened.append(request) or StandIn(engine)
sys.exit(main(sys.argv[1:]))
"""


def stand_in(*argv: str) -> list[str]:
    """The command as a process of its own, on the stand-in for the engine."""
    return [sys.executable, "-c", STAND_IN.format(paths=[str(Path(__file__).parents[1])]), *argv]


def run_stand_in(folder: Path, *argv: str, stdout: str) -> tuple[int, str]:
    """Its code and what it says."""
    with open(stdout, "wb") as out:
        done = subprocess.run(
            stand_in(*argv), stdout=out, stderr=subprocess.PIPE, check=False, cwd=folder
        )
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize(
    ("without", "out", "err"),
    [(">&-", "", "speech: "), ("2>&-", "Hello there\n", ""), ("<&- >&- 2>&-", "", "")],
)
def test_a_process_without_standard_streams(
    tmp_path: Path, without: str, out: str, err: str
) -> None:
    shell = ["sh", "-c", f'"$@" {without}', "sh", *stand_in("run", "-p", "hi")]
    done = subprocess.run(shell, capture_output=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout.decode()) == (0, out)
    assert err in done.stderr.decode() and bool(done.stderr) == bool(err)
    assert soundfile.info(tmp_path / "lowvram.wav").frames == 4_800


def test_nobody_need_read_the_notes(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        stand_in("run", "-p", "hi"),
        stdout=subprocess.PIPE,
        stderr=writing,
        check=False,
        cwd=tmp_path,
    )
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, b"Hello there\n")
    assert soundfile.info(tmp_path / "lowvram.wav").frames == 4_800


def test_a_pipe_whose_reader_leaves_is_named(engine: Any, capsys: Any) -> None:
    os.mkfifo("pipe")
    reading = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    engine.script = ["Hello", NOISE, lambda: os.close(reading), NOISE]
    assert main(["-p", "hi", "-o", "pipe", "-q"]) == 1
    said = "lowvram-demo: error: pipe was closed before the reply was complete\n"
    assert capsys.readouterr() == ("Hello\n", said)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("/dev/full", "standard output: No space left on device"),
        (None, "standard output was closed before the reply was complete"),
    ],
)
def test_a_stream_that_cannot_go_on_is_one_line(place: str | None, said: str) -> None:
    work = (
        "import sys, numpy as np\n"
        "from lowvram.cli.main import command\n"
        "from lowvram.cli.arguments import parse\n"
        "from lowvram.cli.wav import open_sink\n"
        "def speak(args, console):\n"
        "    sink = open_sink('-')\n"
        "    sink.write(np.zeros(300)); sink.write(np.zeros(300))\n"
        "    return 0\n"
        "sys.exit(command('speak', lambda: parse(['-o', '-']), speak))\n"
    )
    if place is None:
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(place, os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, "-c", work], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr.decode()) == (1, f"speak: error: {said}\n")
