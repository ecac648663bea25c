"""What a step of a decode loop and the host tell each other: one copy each way, and no waiting."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lowvram.models.rope import Rope
from lowvram.models.text import Decoder
from lowvram.offload import Device, Mark

Parts = Mapping[str, tuple[Sequence[int], torch.dtype]]
"""Shape and type of tensors by name."""

_TURNS = 64  # positions whose tables are made at a time
_ALIGN = 64  # bytes; what vector instructions like, and a multiple of every item


class StepInputs:
    """Tensors that the host fills before a step, on the device in memory that stays where it is.

    `there` has them by name. Where device memory is not host memory, two pinned pieces take turns:
    before one is filled, the step must be done that the last but one was sent for.
    """

    def __init__(self, device: Device, parts: Parts) -> None:
        lane, size = device.copy_lane(), _span(parts)
        self._memory = torch.empty(size, dtype=torch.uint8, device=device.torch)
        if device.type == "cpu":
            self._hosts = [self._memory]
        elif lane is None:
            self._hosts = [torch.empty(size, dtype=torch.uint8, device="cpu")]
        else:
            self._hosts = [lane.host_buffer(size) for _ in range(2)]
        self._slots = [_views(host, parts) for host in self._hosts]
        self._turn = 0
        self.there = _views(self._memory, parts)

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
            self._free.extend(self._lane.host_buffer(8).view(torch.int64) for _ in range(2))
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
    """Rotary tables of one position after the other, from `start` on; made on the host, many at a
    time."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype, start: int) -> None:
        self._decoder, self._dtype = decoder, dtype
        self._made: Iterator[Rope] = iter(())
        self.start = start
        self._next = start

    def next(self) -> Rope:
        """Those of the next position, each [1, 1, 1, head_dim]."""
        turn = next(self._made, None)
        if turn is not None:
            return turn
        places = torch.arange(self._next, self._next + _TURNS, device="cpu").expand(3, 1, -1)
        self._next += _TURNS
        cos, sin = self._decoder.tables(places, self._dtype)
        self._made = zip(cos.split(1, 1), sin.split(1, 1), strict=True)
        return self.next()


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
