"""`torch.npu` of the simulated device: what torch_npu offers that a program of ours may use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from .native import Native

Where = int | str | torch.device | None


def make_stream(device: Where = None, priority: int = 0) -> torch.Stream:
    """A queue of tasks on the device."""
    return torch.Stream(device="npu:0", priority=priority)


def make_event(enable_timing: bool = True, blocking: bool = False) -> torch.Event:
    """A place in a stream."""
    return torch.Event(device="npu:0", enable_timing=enable_timing)


def make_module(native: Native) -> ModuleType:
    """The module `torch.npu`, for `torch._register_device_module`."""
    device = torch.device("npu", 0)

    @contextmanager
    def stream(used: torch.Stream) -> Iterator[None]:
        with used:
            yield

    def mem_get_info(index: Where = None) -> tuple[int, int]:
        return native.size("free"), native.size("limit")

    def set_share(fraction: float, index: Where = None) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
        native.set("share", fraction)

    def memory_stats(index: Where = None) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": native.size("allocated"),
            "allocated_bytes.all.peak": native.size("max_allocated"),
            "reserved_bytes.all.current": native.size("reserved"),
            "reserved_bytes.all.peak": native.size("max_reserved"),
            "num_ooms": native.size("refusals"),
        }

    def of(name: str) -> Any:
        return lambda index=None: native.size(name)

    module = ModuleType("torch.npu")
    module.__dict__["config"] = SimpleNamespace(allow_internal_format=True)
    module.__dict__["jit_compile"] = True
    names: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda index: None,
        "get_device_name": lambda index=None: "simulated",
        "is_bf16_supported": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "memory_allocated": of("allocated"),
        "max_memory_allocated": of("max_allocated"),
        "memory_reserved": of("reserved"),
        "max_memory_reserved": of("max_reserved"),
        "memory_stats": memory_stats,
        "mem_get_info": mem_get_info,
        "reset_peak_memory_stats": lambda index=None: native.call("sim_reset_peaks"),
        "empty_cache": lambda: native.call("sim_empty_cache"),
        "set_per_process_memory_fraction": set_share,
        "synchronize": lambda index=None: torch.accelerator.synchronize(device),
        "current_stream": lambda index=None: torch.accelerator.current_stream(device),
        "set_stream": torch.accelerator.set_stream,
        "set_compile_mode": lambda jit_compile: module.__dict__.update(jit_compile=jit_compile),
        "default_stream": lambda index=None: torch.Stream(
            stream_id=0, device_index=0, device_type=device_type()
        ),
        "stream": stream,
        "Stream": make_stream,
        "Event": make_event,
        "OutOfMemoryError": torch.OutOfMemoryError,
    }
    for name, value in names.items():
        setattr(module, name, value)
    return module


def device_type() -> int:
    """torch's number for the kind of device that PrivateUse1 is."""
    return int(torch._C._autograd.DeviceType.PrivateUse1.value)


def pretend_torch_npu(module: ModuleType) -> None:
    """Let `import torch_npu` work, as it does where the real package is installed."""
    package = ModuleType("torch_npu")
    package.__spec__ = ModuleSpec("torch_npu", None)
    package.__dict__["npu"] = module
    sys.modules["torch_npu"] = package
