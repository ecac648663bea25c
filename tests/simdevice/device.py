"""The simulated device as tests see it. Loading it registers `npu` with torch, for good: do so in
a process of its own (see `simulated`)."""

from __future__ import annotations

import torch

from .build import library
from .native import Native
from .npu import make_module, pretend_torch_npu

_loaded: list[Native] = []


def load() -> None:
    """Make `npu:0` the accelerator of this process. Nothing happens the second time."""
    if _loaded:
        return
    native = Native(library())
    native.call("sim_register")
    torch.utils.rename_privateuse1_backend("npu")
    module = make_module(native)
    torch._register_device_module("npu", module)
    torch.utils.generate_methods_for_privateuse1_backend()
    pretend_torch_npu(module)
    _loaded.append(native)


def _native() -> Native:
    if not _loaded:
        raise RuntimeError("the simulated device is not loaded; call load() in its own process")
    return _loaded[0]


def configure(**numbers: float) -> None:
    """Set properties of the device.

    Bytes: `limit` (all of its memory), `context` (the driver's, of this process), `others` (other
    processes'). Bytes a second: `h2d`, `d2h` (pinned), `hbm`. `pageable`: the share of these that
    copies of unpinned memory reach. `transposed`: samples that a depthwise transposed convolution
    is given at once, at most (longer ones are an order of magnitude slower on Ascend from 6144 on,
    github.com/vllm-project/vllm-omni/pull/7896); 0, as it begins: any. `flops` a second. `launch`:
    seconds of the host for each task.
    """
    for name, value in numbers.items():
        _native().set(name, value)


def reset() -> None:
    """Wait for everything; then time, races, peaks, counts and planned failures start again."""
    _native().call("sim_reset")


def now() -> float:
    """Virtual seconds until all that was queued is done."""
    return _native().get("now")


def host_now() -> float:
    """Virtual seconds of the host, which runs ahead of the device until it waits."""
    return _native().get("host")


def busy(engine: str) -> float:
    """Virtual seconds that `compute`, `h2d` or `d2h` has worked."""
    return _native().get(f"busy_{engine}")


def races() -> list[str]:
    """What was found out of order, one line for each kind and pair of operators."""
    return _native().lines("sim_races")


def host_operators() -> dict[str, int]:
    """Operators that Ascend has no kernel for and sends to the host, and how often they ran."""
    rows = (line.rsplit(" ", 1) for line in _native().lines("sim_on_host"))
    return {name: int(count) for name, count in rows}


def allocations() -> int:
    """Allocations on the device since `reset`; refused ones do not count."""
    return _native().size("allocations")


def refusals() -> int:
    """Allocations refused since `reset`, for the limit or as planned."""
    return _native().size("refusals")


def waits() -> int:
    """How often the host has waited for the device since `reset`; a copy that is not of pinned
    memory, or not asked to be on its own, is a wait."""
    return _native().size("waits")


def live_bytes() -> int:
    """In live storages, each rounded up to 512."""
    return _native().size("allocated")


def live_storages() -> int:
    """How many storages are on the device."""
    return _native().size("blocks")


def pinned_bytes() -> int:
    """Of pinned host memory."""
    return _native().size("pinned")


def fail_allocation(n: int, *, pinned: bool = False) -> None:
    """Have the `n`-th allocation from now fail, once: of the device, or of pinned host memory."""
    _native().set("fail_pinned" if pinned else "fail_device", n)
