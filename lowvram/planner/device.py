"""What the planner knows of a device, and the budget that a request gets on it. No torch."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

from lowvram.errors import DeviceError, UsageError
from lowvram.offload import (
    Budget,
    default_device,
    devices,
    format_size,
    guard_bytes,
    parse_device,
    parse_size,
)

ASSUMED_CONTEXT_BYTES = int(0.45 * 2**30)
"""What a driver takes before the first tensor, where it has not been measured (cuda, npu)."""

LIBRARY_BYTES = {"cuda": 64 * 2**20, "npu": 64 * 2**20, "cpu": 0, "meta": 0}
"""What matrix libraries keep for themselves in the allocator's memory, and its rounding: an upper
bound for each type of device."""


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """A device as the planner sees it.

    `free_bytes` is what this process could hold on it in all, context included; it and
    `total_bytes` are None where the device is not present. `assumed` says that the context is an
    assumption, not a measurement; `bfloat16` that it computes in that type by itself.
    `library` bytes are taken by libraries and by the allocator's rounding while anything is
    computed; None is the bound for the type.
    """

    name: str
    type: str
    total_bytes: int | None
    free_bytes: int | None
    context_bytes: int
    assumed: bool = False
    bfloat16: bool = True
    library: int | None = None

    @property
    def library_bytes(self) -> int:
        """What libraries and rounding take at most."""
        return LIBRARY_BYTES[self.type] if self.library is None else self.library


def probe_device(name: str) -> DeviceFacts:
    """Facts about a device by name (`auto`, `cpu`, `cuda[:i]`, `npu[:i]`, `meta`), without torch.

    Raises:
        UsageError: a name that is none of these.
    """
    kind, index = parse_device(default_device() if name == "auto" else name)
    own = 0 if kind in ("cpu", "meta") else ASSUMED_CONTEXT_BYTES
    for device in devices():
        if device.name in (kind, f"{kind}:{index}"):
            return DeviceFacts(
                name=device.name,
                type=kind,
                total_bytes=device.total_bytes,
                free_bytes=device.free_bytes,
                context_bytes=own,
                assumed=own > 0,
            )
    return DeviceFacts(
        name=name, type=kind, total_bytes=None, free_bytes=None, context_bytes=own, assumed=own > 0
    )


def decide_budget(max_memory: str | int | float | None, facts: DeviceFacts) -> Budget:
    """The budget on that device: what was asked for, at most what is free; by default all of that.

    Warns once when the number asked for is above the free memory, and lowers it.

    Raises:
        UsageError: no size, or more than the device has.
        DeviceError: nothing was asked for and the device is not there to be asked.
    """
    if max_memory is None:
        if facts.free_bytes is None:
            if facts.type == "meta":
                return _budget(2**50, facts)
            raise DeviceError(
                f"{facts.name} is not present, so its free memory is not known; "
                "say how much there is with --max-memory (max_memory=)"
            )
        return _budget(facts.free_bytes, facts)
    asked = parse_size(max_memory)
    if facts.total_bytes is not None and asked > facts.total_bytes:
        raise UsageError(
            f"--max-memory {format_size(asked)} is more than {facts.name} has "
            f"({format_size(facts.total_bytes)}); ask for less"
        )
    if facts.free_bytes is not None and asked > facts.free_bytes:
        warnings.warn(
            f"--max-memory {format_size(asked)} lowered to the {format_size(facts.free_bytes)} "
            f"that {facts.name} has free",
            stacklevel=2,
        )
        asked = facts.free_bytes
    return _budget(asked, facts)


def _budget(asked: int, facts: DeviceFacts) -> Budget:
    return Budget(
        budget_bytes=asked, context_bytes=facts.context_bytes, guard_bytes=guard_bytes(asked)
    )


class DtypeChoice(NamedTuple):
    """The compute type by name, and why it was taken."""

    name: str
    reason: str


def resolve_dtype(
    requested: str, stored: str, facts: DeviceFacts, *, packed: bool = False
) -> DtypeChoice:
    """The compute type and why: as stored, but none that the device is slow at or has not.

    `packed` says that the checkpoint has 4-bit weights.

    Raises:
        UsageError: a type that is none of `auto`, `float32`, `bfloat16`, `float16`.
    """
    known = ("float32", "bfloat16", "float16")
    if requested == "auto":
        if stored == "bfloat16" and not facts.bfloat16:
            return DtypeChoice("float16", f"stored as bfloat16, which {facts.name} has not")
        if stored == "float16" and facts.type == "cpu":
            return DtypeChoice("bfloat16", "stored as float16, which the CPU is slow at")
        if packed and stored == "float16" and facts.type == "cuda" and facts.bfloat16:
            return DtypeChoice(
                "bfloat16",
                "stored as float16, in which CUDA has no second 4-bit product if ours cannot run",
            )
        return DtypeChoice(stored, "as stored")
    if requested not in known:
        raise UsageError(f"unknown dtype {requested!r}; wanted auto, {', '.join(known)}")
    return DtypeChoice(requested, "asked for")
