"""Processes that are killed or interrupted at random moments while they speak: the file opens."""

from __future__ import annotations

import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from lowvram.cli.wav import pcm16

PATIENCE = 60
"""Seconds until something that must come is given up."""

COMMAND = [sys.executable, "-m", "lowvram.cli.main"]
LONG = ("--max-tokens", "3", "--max-speech", "60", "--device", "cpu")

LIVES = 40
WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from lowvram.cli.wav import WavFile
samples = (np.arange(1_000_000) % 1999 / 2000).astype(np.float32)
for life in range({lives}):
    folder = Path(str(life))
    folder.mkdir()
    if life % 2:
        (folder / "a.wav").write_bytes(b"old")
    child = os.fork()
    if not child:
        draw, done = random.Random(life), 0
        sink = WavFile(folder / "a.wav")
        while True:
            piece = samples[done : done + draw.randint(1, 3000)]
            sink.write(piece)
            done += len(piece)
    time.sleep(random.Random(-life).uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def until(found: Callable[[], Any]) -> Any:
    """What `found` gives as soon as it gives something."""
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)
    return value


def read(path: Path) -> np.ndarray:
    """The samples, int16, as two readers agree on them."""
    samples, rate = soundfile.read(path, dtype="int16")
    with wave.open(str(path)) as file:
        shape = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        data = file.readframes(file.getnframes())
    assert rate == 24_000 and shape == (24_000, 1, 2)
    assert data == samples.tobytes()
    return samples


def test_a_writer_that_is_killed_at_any_moment_leaves_a_wav(tmp_path: Path) -> None:
    work = WRITERS.format(lives=LIVES)
    subprocess.run([sys.executable, "-c", work], cwd=tmp_path, check=True, timeout=PATIENCE)
    whole = pcm16((np.arange(1_000_000) % 1999 / 2000).astype(np.float32))
    lengths = []
    for life in range(LIVES):
        path = tmp_path / str(life) / "a.wav"
        if not path.exists():
            assert not life % 2, "what was there before is gone"
            continue
        if path.read_bytes() == b"old":
            continue
        samples = read(path)
        assert np.array_equal(samples, whole[: len(samples)])
        lengths.append(len(samples))
    assert len(set(lengths)) > LIVES // 4


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_a_command_that_is_stopped_while_it_speaks_leaves_a_wav(tmp_path: Path, name: str) -> None:
    path, number = tmp_path / "a.wav", signal.Signals[name]
    argv = [*COMMAND, "-p", "hi", *LONG, "-q", "-o", str(path)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as running:
        until(lambda: path.exists() and path.stat().st_size > 44)
        time.sleep(random.Random(name).uniform(0, 0.3))
        running.send_signal(number)
        _, said = running.communicate(timeout=PATIENCE)
    spoken = len(read(path)) / 24_000
    assert spoken > 0
    if number == signal.SIGKILL:
        assert running.returncode == -number
        return
    assert running.returncode == 130
    told = re.fullmatch(rb"lowvram-demo: interrupted; (.*) s of speech are in .*a\.wav\n", said)
    # A piece may be in the file and not yet be told of.
    assert told and 0 < float(told[1]) <= spoken + 0.06
    assert [one.name for one in tmp_path.iterdir()] == ["a.wav"]


def test_ctrl_c_in_a_chat_stops_the_reply_and_twice_leaves(tmp_path: Path) -> None:
    keyboard, terminal = pty.openpty()
    path = tmp_path / "a-1.wav"
    argv = [*COMMAND, "chat", *LONG, "-o", "a.wav"]
    shown = bytearray()

    def shows(text: bytes) -> bool:
        os.set_blocking(keyboard, False)
        with suppress(BlockingIOError):
            shown.extend(os.read(keyboard, 65536))
        return text in shown

    with subprocess.Popen(
        argv, stdin=terminal, stdout=terminal, stderr=terminal, cwd=tmp_path
    ) as running:
        until(lambda: shows(b"> "))
        os.write(keyboard, b"hi\n")
        until(lambda: path.exists() and path.stat().st_size > 44)
        running.send_signal(signal.SIGINT)
        until(lambda: shows(b"s of speech are in a-1.wav; Ctrl-C again, Ctrl-D or /exit leaves)"))
        os.write(keyboard, b"/speaker\n")
        until(lambda: shows(b"Chelsie, Ethan"))
        shown.clear()
        running.send_signal(signal.SIGINT)
        until(lambda: shows(b"(Ctrl-C again, Ctrl-D or /exit leaves)"))
        running.send_signal(signal.SIGINT)
        assert running.wait(PATIENCE) == 130
    assert until(lambda: shows(b"lowvram-demo: interrupted"))
    os.close(terminal)
    os.close(keyboard)
    assert len(read(path)) > 0
    assert [one.name for one in tmp_path.iterdir()] == ["a-1.wav"]
