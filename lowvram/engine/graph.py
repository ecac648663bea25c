"""Decode steps whose launches are recorded once, as a CUDA graph, and then replayed.

A recorded step computes on the same addresses and the same shapes every time. So its inputs stay
in one place, the position is a number on the device, and attention reads a whole span of keys, of
which a bias hides those that are not written yet (`KVCache.follow`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lowvram.engine.context import Context
from lowvram.engine.spans import LONGEST, graph_bytes
from lowvram.offload import Device, clear_frames, format_size, out_of_memory

Body = Callable[[], Tensor]
"""One step: reads and writes only tensors that stay, and returns its result."""


class Recorder(Protocol):
    """What a device records steps with."""

    def record(self, body: Body) -> tuple[Tensor, Callable[[], None]]:
        """Record a body, which may run before; its result, and what brings it up to date there."""


class CudaRecorder:
    """Records CUDA graphs."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def record(self, body: Body) -> tuple[Tensor, Callable[[], None]]:
        # Once for real: libraries take their workspaces and kernels are loaded before recording.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            body()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads read ahead and pin memory meanwhile, which is no part of this.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = body()
        return result, graph.replay


def recorder_for(device: Device) -> Recorder | None:
    """What records steps on that device; None where nothing does."""
    if device.type == "cuda" and hasattr(torch.cuda, "CUDAGraph"):
        return CudaRecorder()
    return None


def in_place(device: Device, max_tokens: int) -> bool:
    """Whether steps with a cache for that many tokens compute in one place, recorded or not. It
    depends on nothing else, so that a step computes the same whatever the budget."""
    return device.type == "cuda" and max_tokens <= LONGEST


class StepGraph:
    """The step of one part, replayed where it can be recorded, else run as it is.

    A recording is kept until the step is another one: only one is there at a time.

    Args:
        layers, step_bytes: see `graph_bytes`.
    """

    def __init__(self, context: Context, part: str, layers: int, step_bytes: int) -> None:
        self._context, self._part = context, part
        self._bytes = graph_bytes(layers, step_bytes)
        self._recorder = recorder_for(context.device)
        self._recorded: tuple[int, Tensor, Callable[[], None]] | None = None

    def run(self, body: Body, span: int) -> Tensor:
        """The body's result; it stands until the next run. Another `span` is another step."""
        if self._recorder is not None and (self._recorded is None or self._recorded[0] != span):
            self._record(self._recorder, body, span)
        if self._recorded is None:
            return body()
        _, result, replay = self._recorded
        replay()
        return result

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
        if room := self._lacks():
            self._give_up(room)
            return
        try:
            result, replay = recorder.record(body)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self._give_up("out of memory" if out_of_memory(error) else reason[0][:160])
            clear_frames(error)
            self._context.device.empty_cache()
            return
        self._recorded = span, result, replay
        self._context.recorded[self._part] = self._bytes
        self._context.meter.hold("workspace", self._key, self._bytes)
        if self._context.scratch.nbytes:
            self._give_up("packed weights are de-quantized for every product")

    def _lacks(self) -> str:
        """Why the plan has no room for a recording; empty where it has."""
        plan = self._context.plan
        peak = max(r.predicted_peak_bytes for r in plan.phases if self._part in r.modules)
        room = plan.budget_bytes - plan.guard_bytes - peak
        room -= sum(self._context.recorded.values())
        if room >= self._bytes:
            return ""
        return f"it takes up to {format_size(self._bytes)}, the plan leaves {format_size(room)}"

    def _give_up(self, reason: str) -> None:
        self.forget()
        self._recorder = None
        self._context.note(f"{self._part}: steps are launched one by one, not recorded: {reason}")
