"""A simulated accelerator, registered as `npu`: the CPU's results on a device of limited memory,
with streams on a virtual clock and a race detector. Compiled when first used."""

from .device import (
    allocations,
    busy,
    configure,
    fail_allocation,
    host_now,
    host_operators,
    live_bytes,
    live_storages,
    load,
    now,
    pinned_bytes,
    races,
    refusals,
    reset,
    waits,
)
from .process import simulated

__all__ = [
    "allocations",
    "busy",
    "configure",
    "fail_allocation",
    "host_now",
    "host_operators",
    "live_bytes",
    "live_storages",
    "load",
    "now",
    "pinned_bytes",
    "races",
    "refusals",
    "reset",
    "simulated",
    "waits",
]
