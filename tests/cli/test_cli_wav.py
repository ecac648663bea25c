"""WAV files that open at every moment, and outputs that fail."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
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


def test_a_disk_that_fills_up_is_one_line(engine: Any, capsys: Any) -> None:
    engine.script = ["Hello", NOISE, NOISE]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
        assert main(["-p", "hi", "-q"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    said = "lowvram-demo: error: cannot write lowvram.wav: File too large; choose another place"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
    assert list(Path().iterdir()) == []


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
