"""What a step of a decode loop and the host tell each other: one copy each way, and no waiting."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from lowvram.models.rope import Rope
from lowvram.models.text import Decoder
from lowvram.offload import CopyLane, Device, Mark

Parts = Mapping[str, tuple[Sequence[int], torch.dtype]]
"""Shape and type of tensors by name."""

_ALIGN = 64  # bytes; what vector instructions like, and a multiple of every item


class StepInputs:
    """Tensors that the host fills before a step, on the device in memory that stays where it is.

    `there` has them by name. Where device memory is not host memory, two pieces take turns there:
    before one is filled, the step must be done that the last but one was sent for.
    """

    def __init__(self, device: Device, parts: Parts) -> None:
        lane, size = device.copy_lane(), _span(parts)
        self._memory = torch.empty(size, dtype=torch.uint8, device=device.torch)
        if device.type == "cpu":
            self._hosts = [self._memory]
        else:
            self._hosts = _two_on_host(lane, size)
        self._slots = [_views(host, parts) for host in self._hosts]
        self._turn = 0
        self.there = _views(self._memory, parts)

    @property
    def tensors(self) -> list[Tensor]:
        """The memory behind `there`."""
        return [self._memory]

    def fill(self) -> dict[str, Tensor]:
        """The tensors on the host, to be written and then sent."""
        self._turn = (self._turn + 1) % len(self._slots)
        return self._slots[self._turn]

    def send(self) -> None:
        """Queue the copy of what was filled; the host does not wait."""
        host = self._hosts[self._turn]
        if host is not self._memory:
            self._memory.copy_(host, non_blocking=True)


class Readback:
    """Ids on their way from the device, in order; at most two at a time.

    `lag` says how many steps later the host should ask for one, so as not to keep the device
    waiting for its next step.
    """

    def __init__(self, device: Device) -> None:
        self._lane = device.copy_lane()
        self.lag = 0 if self._lane is None else 1
        self._free: deque[Tensor] = deque()
        if self._lane is not None:
            self._free.extend(piece.view(torch.int64) for piece in _two_on_host(self._lane, 8))
        self._coming: deque[tuple[Tensor, Mark | None]] = deque()

    def __len__(self) -> int:
        return len(self._coming)

    def send(self, token: Tensor) -> None:
        """Queue the copy of an id, int64 [1] on the device, which may then be written anew."""
        if self._lane is None:
            # `meta` has no values; 0 stands for all of them.
            known = 0 if token.is_meta else int(token)
            self._coming.append((torch.tensor([known], device="cpu"), None))
            return
        target = self._free.popleft()
        target.copy_(token, non_blocking=True)
        self._coming.append((target, self._lane.compute_mark()))

    def take(self) -> int:
        """The oldest id that was sent, once it has come."""
        target, mark = self._coming.popleft()
        if mark is None:
            return int(target)
        mark.synchronize()
        self._free.append(target)
        return int(target)


class Turns:
    """Rotary tables of positions that follow each other, made on the host `ahead` at a time."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype, ahead: int) -> None:
        self._decoder, self._dtype, self._ahead = decoder, dtype, ahead
        self._made = range(0)
        self._tables: Rope | None = None

    def at(self, position: int) -> Rope:
        """Those of one position, each [1, 1, 1, head_dim]."""
        if self._tables is None or position not in self._made:
            self._made = range(position, position + self._ahead)
            places = torch.arange(position, self._made.stop, device="cpu").expand(3, 1, -1)
            self._tables = self._decoder.tables(places, self._dtype)
        cos, sin = self._tables
        row = position - self._made.start
        return cos[:, row : row + 1], sin[:, row : row + 1]


def _two_on_host(lane: CopyLane | None, size: int) -> list[Tensor]:
    """Pinned where that can be had; else the host waits for its copies."""
    if lane is not None:
        with suppress(RuntimeError):
            return [lane.host_buffer(size) for _ in range(2)]
    return [torch.empty(size, dtype=torch.uint8, device="cpu") for _ in range(2)]


def _span(parts: Parts) -> int:
    return sum(_bytes(*part) for part in parts.values())


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Of one tensor, with what lies between it and the next."""
    return -(-math.prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN


def _views(memory: Tensor, parts: Parts) -> dict[str, Tensor]:
    views, start = {}, 0
    for name, (shape, dtype) in parts.items():
        piece = memory[start : start + math.prod(shape) * dtype.itemsize]
        views[name] = piece.view(dtype).view(tuple(shape))
        start += _bytes(shape, dtype)
    return views
