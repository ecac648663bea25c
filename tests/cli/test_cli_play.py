"""`--play`: what reaches the sound device, and what is said where there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from lowvram.cli.main import main
from lowvram.cli.play import Player

SOUND = np.linspace(-1, 1, 6_000, dtype=np.float32)


class Device:
    """The part of `sounddevice` that is used; `heard` are the samples that were played."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails = fails
        self.heard: list[float] = []
        self.opened = 0
        self.closed = 0

    def open(self, rate: int, *, channels: int, dtype: str) -> Any:
        if self.fails is not None:
            raise self.fails
        assert (rate, channels, dtype) == (24_000, 1, "float32")
        self.opened += 1
        return self

    def write(self, samples: np.ndarray) -> None:
        assert samples.shape[1] == 1 and samples.dtype == np.float32
        self.heard.extend(samples[:, 0].tolist())

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.closed += 1


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Any:
    def plug_in(device: Device) -> Device:
        module: Any = ModuleType("sounddevice")
        module.OutputStream = device.open
        monkeypatch.setitem(sys.modules, "sounddevice", module)
        return device

    return plug_in


def test_run_plays_what_it_writes(engine: Any, plug: Any, capsys: Any) -> None:
    device = plug(Device())
    engine.script = ["Hello", SOUND, SOUND[:10]]
    assert main(["-p", "hi", "--play"]) == 0
    assert device.heard == [*SOUND.tolist(), *SOUND[:10].tolist()]
    assert soundfile.info("lowvram.wav").frames == 6_010
    assert (device.opened, device.closed) == (1, 1)


def test_nothing_is_opened_without_speech(engine: Any, plug: Any) -> None:
    device = plug(Device())
    assert main(["-p", "hi", "--play", "--no-speech"]) == 0
    assert device.opened == 0


@pytest.mark.parametrize("verb", ["run", "chat"])
@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (None, "needs sounddevice (pip install lowvram-omni[play]); no sound"),
        (OSError("PortAudio library not found"), "finds no sound device (PortAudio library not"),
        (RuntimeError("Error querying\ndevice -1"), "finds no sound device (Error querying dev"),
    ],
)
def test_a_missing_device_is_said_once(
    engine: Any,
    plug: Any,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    fails: Exception | None,
    said: str,
) -> None:
    if fails is None:
        monkeypatch.setitem(sys.modules, "sounddevice", None)
    else:
        plug(Device(fails))
    lines = iter(["more"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, "/exit"))
    assert main([verb, "-p", "hi", "--play"]) == 0
    assert capsys.readouterr().err.count(f"note: --play {said}") == 1
    assert len(engine.asked) == (1 if verb == "run" else 2)
    assert len(list(Path().glob("*.wav"))) == len(engine.asked)


def test_an_interruption_is_silent(engine: Any, plug: Any) -> None:
    device = plug(Device())
    engine.script = ["Hello", SOUND, KeyboardInterrupt()]
    assert main(["-p", "hi", "--play"]) == 130
    assert device.closed == 1 and len(device.heard) <= len(SOUND)


@pytest.mark.parametrize("when", ["write", "__enter__", "__exit__"])
def test_a_device_that_fails_ends_no_reply(
    engine: Any, plug: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("device\nunplugged")

    plug(Device())
    monkeypatch.setattr(Device, when, fail)
    engine.script = ["Hello", SOUND]
    assert main(["-p", "hi", "--play"]) == 0
    assert soundfile.info("lowvram.wav").frames == 6_000
    said = "note: the sound device failed (device unplugged); not all was heard\n"
    assert capsys.readouterr().err.count(said) == 1


def test_another_ctrl_c_while_the_device_falls_silent_leaves_the_file(
    engine: Any, plug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(player: Player) -> None:
        raise KeyboardInterrupt

    plug(Device())
    monkeypatch.setattr(Player, "stop", impatient)
    Path("lowvram.wav").write_bytes(b"old")
    engine.script = ["Hello", SOUND, KeyboardInterrupt()]
    assert main(["-p", "hi", "--play"]) == 130
    assert [path.name for path in Path().iterdir()] == ["lowvram.wav"]
    assert soundfile.info("lowvram.wav").frames == 6_000
