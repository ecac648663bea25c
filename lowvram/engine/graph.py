"""Decode steps whose launches are recorded once, as a CUDA graph, and then replayed.

A recorded step computes on the same addresses and the same shapes every time. So its inputs stay
in one place, the position is a number on the device, and attention reads a whole span of keys, of
which a bias hides those that are not written yet (`KVCache.follow`).
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowvram.engine.context import Context
from lowvram.engine.spans import SUMS_BYTES, WORKSPACE_BYTES
from lowvram.offload import Device, clear_frames, out_of_memory

Body = Callable[[], Tensor]
"""One step: reads and writes only tensors that stay, and returns its result."""


class Recorder(Protocol):
    """What a device records steps with."""

    def record(self, body: Body) -> tuple[Tensor, Callable[[], None]]:
        """Record a body, which may run before; its result, and what brings it up to date there."""


class CudaRecorder:
    """Records CUDA graphs on one device, whichever is the current one of the thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, body: Body) -> tuple[Tensor, Callable[[], None]]:
        # A recording that fails to end leaves its stream the current one. Entered here as well, the
        # one before is the current one again in any case.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream()):
            return self._recorded(body)

    def _recorded(self, body: Body) -> tuple[Tensor, Callable[[], None]]:
        # Once for real: kernels are compiled and loaded, and the scratch grows, before recording.
        body()
        graph = torch.cuda.CUDAGraph()
        stream = _stream_for(graph, self._device)
        with torch.cuda.stream(stream):
            # The workspace of cuBLAS for this stream, not in the memory of what is recorded.
            one = torch.ones(16, 16, dtype=torch.float16, device=self._device)
            one @ one
        # Other threads read ahead and pin memory meanwhile, which is no part of this.
        recording = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        with _uncollected(), recording:
            result = body()
        return result, graph.replay


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the cyclic collector: what it ends, such as another graph, would break a recording
    that is under way."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _stream_for(graph: torch.cuda.CUDAGraph, device: torch.device) -> torch.cuda.Stream:
    """A stream that records this and nothing else while the graph is there: what ends a graph gives
    back the workspace of its stream, also where another one still reads it
    (github.com/pytorch/pytorch/issues/193402). Used again later: other releases never do.

    Of high priority because torch hands streams out in turn, 32 of each priority: copies, which
    other threads may queue at any time, are of the normal one and never come upon this stream.
    """
    free = _free_streams(device)
    stream = free.pop() if free else torch.cuda.Stream(device, priority=-1)
    weakref.finalize(graph, free.append, stream).atexit = False
    return stream


@functools.cache
def _free_streams(device: torch.device) -> list[torch.cuda.Stream]:
    """Those on which a graph was recorded that is gone."""
    return []


def recorder_for(device: Device) -> Recorder | None:
    """What records steps on that device; None where nothing does."""
    return CudaRecorder(device.torch) if device.type == "cuda" else None


def library_bytes(device: Device) -> int | None:
    """What libraries and rounding take at most, where that is more than is usual for the type of
    device: on Hopper and the large Blackwells cuBLAS has 32 MiB for every stream instead of 8, the
    one that computes and two that record (NVIDIA's documentation of cublasSetWorkspace)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device.torch)[0] not in (9, 10):
        return None
    return 4 * WORKSPACE_BYTES


class _Recorded(NamedTuple):
    """A step that is recorded for a span; `sums` are of the scratch, which others may go on to use
    anew, but not this memory."""

    span: int
    result: Tensor
    replay: Callable[[], None]
    sums: Tensor | None


class StepGraph:
    """The step of one part, replayed where the plan has it recorded, else run as it is.

    A recording is kept until the step is another one: only one is there at a time.
    """

    def __init__(self, context: Context, part: str) -> None:
        self._context, self._part = context, part
        self._bytes = context.plan.recorded.get(part, 0)
        self._recorder = recorder_for(context.device) if self._bytes else None
        self._recorded: _Recorded | None = None

    def run(self, body: Body, span: int) -> Tensor:
        """The body's result; it stands until the next run. Another `span` is another step."""
        if self._recorder is not None and (self._recorded is None or self._recorded.span != span):
            self._record(self._recorder, body, span)
        if self._recorded is None:
            return body()
        self._recorded.replay()
        return self._recorded.result

    def forget(self) -> None:
        """What was recorded may use memory that is no longer the model's."""
        self._recorded = None
        self._context.recorded.pop(self._part, None)
        self._context.meter.release("workspace", self._key)

    @property
    def _key(self) -> str:
        return f"{self._part}: recorded step"

    def _record(self, recorder: Recorder, body: Body, span: int) -> None:
        self.forget()
        try:
            result, replay = recorder.record(body)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self._give_up("out of memory" if out_of_memory(error) else reason[0][:160])
            clear_frames(error)
            self._context.device.empty_cache()
            return
        self._recorded = _Recorded(span, result, replay, self._context.scratch.buffer)
        self._context.recorded[self._part] = self.forget
        self._context.meter.hold("workspace", self._key, self._bytes)
        if self._context.scratch.nbytes > SUMS_BYTES:
            self._give_up("it would keep the memory that weights are de-quantized into")

    def _give_up(self, reason: str) -> None:
        self.forget()
        self._recorder = None
        self._context.note(f"{self._part}: steps are launched one by one, not recorded: {reason}")
