"""Ctrl-C and other signals in `run`: what is kept of the reply, and what is left as it was."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from lowvram.cli.main import main


def test_interrupted_before_the_first_sound_it_leaves_what_was_there(engine: Any) -> None:
    Path("lowvram.wav").write_bytes(b"old")
    engine.script = ["Hello", KeyboardInterrupt()]
    assert main(["-p", "hi"]) == 130
    assert Path("lowvram.wav").read_bytes() == b"old"
    assert [path.name for path in Path().iterdir()] == ["lowvram.wav"]


def test_an_interrupted_reply_keeps_what_was_spoken(engine: Any, capsys: Any) -> None:
    engine.script = ["Hello", np.zeros(24_000, np.float32), KeyboardInterrupt()]
    assert main(["-p", "hi"]) == 130
    said = "lowvram-demo: interrupted; 1.0 s of speech are in lowvram.wav\n"
    assert capsys.readouterr().err.endswith(said)
    assert soundfile.info("lowvram.wav").frames == 24_000
    assert [path.name for path in Path().iterdir()] == ["lowvram.wav"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_is_an_interruption(engine: Any, capsys: Any, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    engine.script = ["Hello", lambda: signal.raise_signal(number), "never"]
    assert main(["-p", "hi"]) == 130
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[-1]) == ("Hello\n", "lowvram-demo: interrupted")
    assert signal.getsignal(number) is before


def test_a_third_ctrl_c_does_not_disturb_the_end(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    engine.script = [KeyboardInterrupt()]
    assert main(["-p", "hi"]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(sys, "argv", ["lowvram-demo", "-p", "hi"])
    try:
        assert main() == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_ignored_stays_so(engine: Any) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        engine.script = ["Hello", lambda: signal.raise_signal(signal.SIGHUP), " there"]
        assert main(["-p", "hi"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
