"""Copies to an accelerator beside its compute: pinned buffers, one stream, events.

Written against torch's device-neutral streams, which CUDA and Ascend back ends both provide.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Mark(Protocol):
    """A place in the order of copies."""

    def synchronize(self) -> None:
        """Return when every copy before the mark is done."""


class CopyLane(Protocol):
    """Where copies from host to device queue up, in order, while the device computes."""

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """Host memory the device can read by itself: uint8 `[nbytes]`."""

    def begin(self) -> None:
        """Copies from here on wait for the compute queued so far (it may still use the memory)."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue `target.copy_(source)`; `source` must stay as it is until a later mark is done."""

    def mark(self) -> Mark:
        """A mark behind every copy queued so far."""

    def finish(self) -> None:
        """Compute queued from here on waits for every copy queued so far; the host does not."""


class StreamLane:
    """A `CopyLane` on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device=device)

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def begin(self) -> None:
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self._stream:
            target.copy_(source, non_blocking=True)

    def mark(self) -> torch.Event:
        return self._stream.record_event()

    def finish(self) -> None:
        torch.accelerator.current_stream(self._device).wait_event(self.mark())
