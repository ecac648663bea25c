"""Interrupted at any step, the work goes on to the same bytes; nothing half passes for whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowvram.errors import CheckpointError, LowVRAMError, UsageError
from lowvram.pocket import make_checkpoint
from lowvram.quantize import Progress

Run = Callable[..., Any]
Read = Callable[[Path], dict[str, bytes]]


class Stop(BaseException):
    """What no handler of the work catches, as none catches SIGKILL."""


class Steps:
    """Stops the work before one of its steps that reach the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        for name in ("fsync", "replace", "rename"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *args, _real=real: self._step(_real, args))

    def _step(self, real: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stop
        real(*args)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def test_stopped_before_every_step_in_turn(
    steps: Steps, source: Path, rounded: Path, quantize: Run, read: Read, tmp_path: Path
) -> None:
    """One run after the other, each stopped two steps later than it began to do something new."""
    result, stops = tmp_path / "result", 0
    while True:
        steps.left = stops
        try:
            quantize(source, result, method="rtn", calibration="none", resume=True)
            break
        except Stop:
            stops += 1
            assert not result.exists(), "what has the name of the result is the whole of it"
    assert stops > 12
    assert read(result) == read(rounded)
    assert list(tmp_path.iterdir()) == [result]


def test_stopped_between_layers_the_search_goes_on_to_the_same_bytes(
    source: Path, whole: Path, quantize: Run, read: Read, tmp_path: Path
) -> None:
    result, seen = tmp_path / "result", []

    def stop(at: Progress) -> None:
        seen.append(at)
        if at.stage == "layer" and at.layer == 1:
            raise Stop

    with pytest.raises(Stop):
        quantize(source, result, on_progress=stop)
    assert not result.exists()
    seen.clear()
    quantize(source, result, resume=True, on_progress=seen.append)
    assert [at.layer for at in seen if at.stage == "layer"] == [2], "the first layer is kept"
    assert read(result) == read(whole)


def test_killed_the_process_leaves_what_can_be_gone_on_with(
    source: Path, rounded: Path, quantize: Run, read: Read, tmp_path: Path
) -> None:
    result = tmp_path / "result"
    code = (
        "import os, signal, sys\n"
        "from lowvram.quantize import QuantizeSettings, quantize_checkpoint\n"
        "s = QuantizeSettings(device='cpu', samples=4, seq_len=96, method='rtn',"
        " calibration='none')\n"
        "def kill(at):\n"
        "    if at.stage == 'layer': os.kill(os.getpid(), signal.SIGKILL)\n"
        "quantize_checkpoint(sys.argv[1], sys.argv[2], s, on_progress=kill)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(source), str(result)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["result.partial"]
    quantize(source, result, method="rtn", calibration="none", resume=True)
    assert read(result) == read(rounded)


def _interrupted(source: Path, result: Path, quantize: Run, **options: Any) -> Path:
    """The folder of a run that was stopped after its first layer."""

    def stop(at: Progress) -> None:
        if at.stage == "layer":
            raise Stop

    with pytest.raises(Stop):
        quantize(source, result, method="rtn", calibration="none", on_progress=stop, **options)
    return result.with_name("result.partial")


def test_a_damaged_layer_or_line_is_made_again(
    source: Path, rounded: Path, quantize: Run, read: Read, tmp_path: Path
) -> None:
    partial = _interrupted(source, tmp_path / "result", quantize)
    (partial / "layers" / "00000.safetensors").open("ab").write(b"x")
    with (partial / "layers.jsonl").open("a") as lines:
        lines.write('{"layer": 1, "sha')
    quantize(source, tmp_path / "result", method="rtn", calibration="none", resume=True)
    assert read(tmp_path / "result") == read(rounded)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"method": "awq"}, "method is 'awq', but the interrupted run began with 'rtn'"),
        ({"seed": 1}, "seed is 1"),
        ({"group_size": 64}, "group_size is 64"),
        ({"calibration": "builtin"}, "calibration is 'builtin'"),
    ],
)
def test_other_options_are_refused(
    changed: dict[str, Any], named: str, source: Path, quantize: Run, tmp_path: Path
) -> None:
    partial = _interrupted(source, tmp_path / "result", quantize)
    options = {"method": "rtn", "calibration": "none"} | changed
    with pytest.raises(UsageError, match=named):
        quantize(source, tmp_path / "result", resume=True, **options)
    assert (partial / "layers" / "00000.safetensors").exists()


def test_another_source_is_refused(source: Path, quantize: Run, small: Run, tmp_path: Path) -> None:
    """Same headers, same sizes, other weights."""
    model = shutil.copytree(source, tmp_path / "model")
    _interrupted(model, tmp_path / "result", quantize)
    make_checkpoint(model, config=small(), shards=2, seed=1)
    with pytest.raises(CheckpointError, match="the source is not the one"):
        quantize(model, tmp_path / "result", resume=True, method="rtn", calibration="none")


def test_an_interrupted_run_is_neither_taken_nor_lost_unasked(
    source: Path, rounded: Path, quantize: Run, read: Read, tmp_path: Path
) -> None:
    partial = _interrupted(source, tmp_path / "result", quantize)
    with pytest.raises(UsageError, match=r"interrupted run; go on with --resume, or begin anew"):
        quantize(source, tmp_path / "result", method="rtn", calibration="none")
    assert partial.exists()
    quantize(source, tmp_path / "result", method="rtn", calibration="none", overwrite=True)
    assert read(tmp_path / "result") == read(rounded)
    assert not partial.exists()


def test_two_processes_do_not_work_in_the_same_place(
    source: Path, quantize: Run, tmp_path: Path
) -> None:
    fcntl = pytest.importorskip("fcntl")
    partial = _interrupted(source, tmp_path / "result", quantize)
    with (partial / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LowVRAMError, match="another process is at work"):
            quantize(source, tmp_path / "result", method="rtn", calibration="none", resume=True)


def test_going_on_with_what_is_finished_does_nothing(
    source: Path, quantize: Run, read: Read, tmp_path: Path
) -> None:
    options = {"method": "rtn", "calibration": "none"}
    quantize(source, tmp_path / "result", **options)
    before, seen = read(tmp_path / "result"), []
    (tmp_path / "result.partial").mkdir()
    (tmp_path / "result.partial" / "job.json").touch()
    report = quantize(source, tmp_path / "result", resume=True, on_progress=seen.append, **options)
    assert not seen and read(tmp_path / "result") == before
    assert list(tmp_path.iterdir()) == [tmp_path / "result"], "what was left over is cleared away"
    assert [layer["layer"] for layer in report.layers] == [0, 1]


def test_what_is_overwritten_stays_until_the_new_is_whole(
    source: Path, rounded: Path, quantize: Run, read: Read, tmp_path: Path
) -> None:
    result = tmp_path / "result"
    result.mkdir()
    (result / "precious.txt").write_text("kept")
    with pytest.raises(UsageError, match="result exists; wanted a new name, or --overwrite"):
        quantize(source, result, method="rtn", calibration="none")
    _interrupted(source, result, quantize, overwrite=True)
    assert read(result) == {"precious.txt": b"kept"}
    quantize(source, result, method="rtn", calibration="none", resume=True, overwrite=True)
    assert read(result) == read(rounded)
    assert list(tmp_path.iterdir()) == [result]


def test_stopped_while_the_old_gives_way_neither_is_lost(
    steps: Steps, source: Path, rounded: Path, quantize: Run, read: Read, tmp_path: Path
) -> None:
    result = tmp_path / "result"
    result.mkdir()
    (result / "precious.txt").write_text("kept")
    stops = 0
    options = {"method": "rtn", "calibration": "none", "overwrite": True}
    while True:
        steps.left = stops
        try:
            quantize(source, result, resume=True, **options)
            break
        except Stop:
            stops += 1
            old = result if result.exists() else tmp_path / "result.partial" / "old"
            assert read(old) == {"precious.txt": b"kept"}
    assert read(result) == read(rounded)


def test_the_report_beside_the_weights_tells_no_times(rounded: Path) -> None:
    text = (rounded / "quantization.json").read_text()
    assert "seconds" not in text and json.loads(text)["job"]["method"] == "rtn"
