"""Devices, bytes and modules: budgets, what memory is held, the checkpoint reader, the loader.

Knows nothing of any model. Names that need torch are imported when first asked for, so that
importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .budget import Budget, format_size, guard_bytes, parse_size
    from .device import Device, open_device
    from .loader import Loader, Part
    from .meter import Meter, PhaseMeasure, TimelinePoint
    from .probe import (
        DeviceInfo,
        default_device,
        defer_npu_autoload,
        devices,
        parse_device,
    )
    from .store import Store, TensorInfo, torch_dtype

__all__ = [
    "Budget",
    "Device",
    "DeviceInfo",
    "Loader",
    "Meter",
    "Part",
    "PhaseMeasure",
    "Store",
    "TensorInfo",
    "TimelinePoint",
    "default_device",
    "defer_npu_autoload",
    "devices",
    "format_size",
    "guard_bytes",
    "open_device",
    "parse_device",
    "parse_size",
    "torch_dtype",
]

_HOME = {
    "budget": ("Budget", "format_size", "guard_bytes", "parse_size"),
    "device": ("Device", "open_device"),
    "loader": ("Loader", "Part"),
    "meter": ("Meter", "PhaseMeasure", "TimelinePoint"),
    "probe": ("DeviceInfo", "default_device", "defer_npu_autoload", "devices", "parse_device"),
    "store": ("Store", "TensorInfo", "torch_dtype"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(".probe", __name__).defer_npu_autoload()
    value = getattr(importlib.import_module(f".{_MODULE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
