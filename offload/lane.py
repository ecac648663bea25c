"""Copies to an accelerator beside its compute: pinned buffers, one stream, events.

Written against torch's device-neutral streams, which CUDA and Ascend back ends both provide.
"""

from __future__ import annotations

import threading
from typing import Protocol

import torch


class Mark(Protocol):
    """A place in the order of copies, or of compute."""

    def synchronize(self) -> None:
        """Return when everything before the mark is done."""


class CopyLane(Protocol):
    """Where copies between host and device queue up, in order, while the device computes.

    Compute is what the calling thread's current stream is given.
    """

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """Host memory the device can read and write by itself: uint8 `[nbytes]`."""

    def trim_host(self) -> None:
        """Give host buffers that nobody has any more back to the system, if they are kept."""

    def after_compute(self) -> None:
        """Copies from here on wait for the compute queued so far (it may still use the memory)."""

    def after(self, mark: Mark) -> None:
        """Copies from here on wait for a mark of `compute_mark`. Any thread may call it."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue `target.copy_(source)`; the one on the host must stay as it is until a later mark
        is done. Any thread may call it."""

    def mark(self) -> Mark:
        """A mark behind every copy queued so far. Any thread may call it."""

    def compute_mark(self) -> Mark:
        """A mark behind the compute queued so far."""

    def wait(self, mark: Mark) -> None:
        """Compute queued from here on waits for the mark; the host does not."""


class StreamLane:
    """A `CopyLane` on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device=device)
        self._entered = threading.Lock()  # a stream object can be entered by one thread at a time

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def trim_host(self) -> None:
        # Not on Ascend, which hands torch no such allocator.
        trim = getattr(torch.accelerator, "empty_host_cache", None)
        if trim is not None and self._device.type == "cuda":
            trim()

    def after_compute(self) -> None:
        self.after(self.compute_mark())

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, torch.Event)
        self._stream.wait_event(mark)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self._entered, self._stream:
            target.copy_(source, non_blocking=True)

    def mark(self) -> torch.Event:
        return self._stream.record_event()

    def compute_mark(self) -> torch.Event:
        return self._compute().record_event()

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, torch.Event)
        self._compute().wait_event(mark)

    def _compute(self) -> torch.Stream:
        return torch.accelerator.current_stream(self._device)
