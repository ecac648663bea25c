"""cuda, npu, cpu and meta behind one small interface: sizes, peaks, limits, copies."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Protocol

import torch
from torch import device as TorchDevice

from lowvram.errors import DeviceError

from . import heap, probe
from .accelerator import ACCELERATORS, AcceleratorDevice, cuda_backend, npu_backend
from .host import host_memory, resident_bytes
from .lane import CopyLane


class Device(Protocol):
    """One device as the engine sees it. Sizes in bytes."""

    name: str
    """As the user writes it: "cuda:0", "npu:0", "cpu", "meta"."""
    type: str
    torch: TorchDevice

    def total_bytes(self) -> int:
        """The device's memory."""

    def free_bytes(self) -> int:
        """The most this process may hold in all: what is free, and what it has already."""

    def context_bytes(self) -> int:
        """What the driver takes for this process before any tensor."""

    def allocated_bytes(self) -> int:
        """In tensors now; on `cpu` the process's resident set."""

    def peak_bytes(self) -> int:
        """The most since `reset_peak`, as the driver counts: context, tensors, cached memory.

        On `cpu` the largest resident set of the process.
        """

    def reset_peak(self) -> None:
        """Count `peak_bytes` from here on."""

    def synchronize(self) -> None:
        """Wait until the device has done all that was queued."""

    def empty_cache(self) -> None:
        """Give freed memory back to the driver."""

    def set_limit(self, nbytes: int | None) -> None:
        """Have the allocator refuse what would take the process above `nbytes`; None lifts it.

        The bytes are those of `peak_bytes`, so the context counts. A CPU has no such limit.
        """

    def copy_lane(self) -> CopyLane | None:
        """Where copies from host memory queue up; None where device memory is host memory."""

    def has_bfloat16(self) -> bool:
        """Whether it computes in bfloat16 by itself."""


def open_device(name: str) -> Device:
    """The device called `name`: "auto", "cpu", "meta", "cuda", "cuda:1", "npu", "npu:1".

    "auto" is cuda where torch sees one, else a usable npu, else cpu. Raises `UsageError` for an
    unknown name and `DeviceError` for a device that this machine or its torch does not have.
    """
    kind, index = probe.parse_device(_auto() if name == "auto" else name)
    if kind == "cpu":
        return CpuDevice()
    if kind == "meta":
        return MetaDevice()
    backend = cuda_backend() if kind == "cuda" else npu_backend()
    count = backend.device_count()
    if index >= count:
        raise DeviceError(
            f"{name} was asked for, but this machine has {count} {kind} device(s), counted from 0"
        )
    return AcceleratorDevice(ACCELERATORS[kind], index, backend)


def _auto() -> str:
    if torch.cuda.is_available():
        return "cuda"
    try:
        npu_backend()
    except DeviceError:
        return "cpu"
    return "npu"


class MetaDevice:
    """Shapes without memory: what a device would hold is counted, nothing is computed."""

    name = "meta"
    type = "meta"

    def __init__(self) -> None:
        self.torch = TorchDevice(self.type)

    def total_bytes(self) -> int:
        return sys.maxsize

    def free_bytes(self) -> int:
        return sys.maxsize

    def context_bytes(self) -> int:
        return 0

    def allocated_bytes(self) -> int:
        return 0

    def peak_bytes(self) -> int:
        return 0

    def reset_peak(self) -> None:
        """Nothing to reset."""

    def synchronize(self) -> None:
        """Nothing is queued."""

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def set_limit(self, nbytes: int | None) -> None:
        """There is no allocator to limit."""

    def copy_lane(self) -> CopyLane | None:
        return None

    def has_bfloat16(self) -> bool:
        return True


class CpuDevice(MetaDevice):
    """Host memory as the device. It has no allocator limit, and its peaks are of the process."""

    name = "cpu"
    type = "cpu"

    def total_bytes(self) -> int:
        return host_memory()[0]

    def free_bytes(self) -> int:
        return host_memory()[1]

    def allocated_bytes(self) -> int:
        return resident_bytes()

    def empty_cache(self) -> None:
        heap.trim()

    def peak_bytes(self) -> int:
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            status = ""
        found = re.search(r"VmHWM:\s+([0-9]+) kB", status)
        return max(int(found[1]) << 10 if found else 0, resident_bytes())

    def reset_peak(self) -> None:
        """Where the system lets a process do so; else the peak stays the one since its start."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return
