"""Reading ahead: which bytes are advised, that it ends, that it never harms."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from lowvram.offload import TensorInfo, ahead
from lowvram.offload.ahead import STEP, ReadAhead

Advice = list[tuple[int, int]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(3 * STEP))
    return path


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> Advice:
    given: Advice = []

    def note(file: int, offset: int, length: int, kind: int) -> None:
        assert kind == os.POSIX_FADV_WILLNEED
        given.append((offset, length))

    monkeypatch.setattr(os, "posix_fadvise", note)
    return given


def tensor(file: Path, offset: int, nbytes: int) -> TensorInfo:
    return TensorInfo("any", "U8", (nbytes,), file, offset, nbytes)


def wait(reading: ReadAhead) -> None:
    assert reading._thread is not None
    reading._thread.join()


def test_every_byte_is_asked_for_in_file_order_and_small_steps(file: Path, advice: Advice) -> None:
    reading = ReadAhead()
    reading.begin([tensor(file, STEP + 10, STEP + 5), tensor(file, 0, 10)])
    wait(reading)
    assert advice == [(0, 10), (STEP + 10, STEP), (2 * STEP + 10, 5)]


def test_no_more_than_half_of_the_free_memory(
    file: Path, advice: Advice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "host_memory", lambda: (0, 4 * STEP))
    reading = ReadAhead()
    reading.begin([tensor(file, 0, 3 * STEP)])
    wait(reading)
    assert sum(length for _, length in advice) == 2 * STEP


def test_what_is_under_way_ends_when_asked_to(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    given: Advice = []

    def hold(_: int, offset: int, length: int, kind: int) -> None:
        given.append((offset, length))
        begun.set()
        go_on.wait(10)

    monkeypatch.setattr(os, "posix_fadvise", hold)
    reading = ReadAhead()
    reading.begin([tensor(file, 0, 3 * STEP)])
    assert begun.wait(10)
    reading._stop.set()
    go_on.set()
    reading.end()
    assert given == [(0, STEP)] and reading._thread is None


def test_a_file_that_is_gone_is_left_to_the_reading_itself(tmp_path: Path, advice: Advice) -> None:
    reading = ReadAhead()
    reading.begin([tensor(tmp_path / "gone", 0, 10)])
    wait(reading)
    reading.end()
    assert advice == []
