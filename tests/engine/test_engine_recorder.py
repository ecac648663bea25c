"""What records on CUDA, with a `torch.cuda` that only keeps books: no device is there."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.engine import graph
from lowvram.engine.graph import CudaRecorder

HERE = torch.device("cpu")


class Books:
    """The streams that were current, and what happened on each."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.current = fails, "main"
        self.made: list[tuple[Any, ...]] = []
        self.done: list[tuple[str, bool]] = []  # on which stream, and whether it was being recorded
        self.recording = False

    def stream(self, device: torch.device, priority: int) -> str:
        self.made.append((device, priority))
        return f"stream {len(self.made)}"

    @contextmanager
    def entered(self, stream: str) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def record(self, made: Any, *, stream: str, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local" and not gc.isenabled()
        before, self.current, self.recording = self.current, stream, True
        try:
            yield
        finally:
            self.recording = False
        if self.fails:
            raise RuntimeError("a recording that was broken off cannot be ended")
        self.current = before


class Graph:
    def replay(self) -> None:
        """Nothing was recorded."""


@pytest.fixture(params=[False, True], ids=["ends", "fails"])
def books(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Books]:
    books = Books(request.param)
    for name, instead in (
        ("device", lambda device: books.entered(books.current)),
        ("current_stream", lambda: books.current),
        ("stream", books.entered),
        ("Stream", books.stream),
        ("CUDAGraph", Graph),
        ("graph", books.record),
    ):
        monkeypatch.setattr(torch.cuda, name, instead)
    graph._free_streams.cache_clear()
    yield books
    graph._free_streams.cache_clear()


def test_a_body_runs_before_it_is_recorded_and_the_stream_is_as_it_was(books: Books) -> None:
    def body() -> Tensor:
        books.done.append((books.current, books.recording))
        assert gc.isenabled() is not books.recording
        return torch.zeros(1)

    for _ in range(2):
        if books.fails:
            with pytest.raises(RuntimeError, match="broken off"):
                CudaRecorder(HERE).record(body)
        else:
            CudaRecorder(HERE).record(body)
        assert books.current == "main" and gc.isenabled()
    # One after the other on one stream, from another pool than those that copy.
    assert books.done == 2 * [("main", False), ("stream 1", True)]
    assert books.made == [(HERE, -1)]


@pytest.mark.parametrize("books", [False], indirect=True)
def test_no_two_recordings_that_are_there_have_one_stream(books: Books) -> None:
    """Torch takes the workspace of a stream away with the first of them."""
    kept = [CudaRecorder(HERE).record(lambda: torch.zeros(1)) for _ in range(3)]
    assert len(books.made) == 3
    del kept[1]
    kept += [CudaRecorder(HERE).record(lambda: torch.zeros(1)) for _ in range(2)]
    assert len(books.made) == 4
