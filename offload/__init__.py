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
    from .exhaustion import out_of_memory
    from .frames import clear_frames
    from .host import host_memory
    from .lane import CopyLane, Mark
    from .loader import Loader
    from .meter import Meter, PhaseMeasure, TimelinePoint
    from .part import Part
    from .pinned import pin, pinned_bytes
    from .placement import Placement, blob_bytes
    from .probe import (
        DeviceInfo,
        default_device,
        defer_npu_autoload,
        devices,
        parse_device,
    )
    from .store import Store, TensorInfo, torch_dtype
    from .stream import UnitStream

__all__ = [
    "Budget",
    "CopyLane",
    "Device",
    "DeviceInfo",
    "Loader",
    "Mark",
    "Meter",
    "Part",
    "PhaseMeasure",
    "Placement",
    "Store",
    "TensorInfo",
    "TimelinePoint",
    "UnitStream",
    "blob_bytes",
    "clear_frames",
    "default_device",
    "defer_npu_autoload",
    "devices",
    "format_size",
    "guard_bytes",
    "host_memory",
    "open_device",
    "out_of_memory",
    "parse_device",
    "parse_size",
    "pin",
    "pinned_bytes",
    "torch_dtype",
]

_HOME = {
    "budget": ("Budget", "format_size", "guard_bytes", "parse_size"),
    "device": ("Device", "open_device"),
    "exhaustion": ("out_of_memory",),
    "frames": ("clear_frames",),
    "host": ("host_memory",),
    "lane": ("CopyLane", "Mark"),
    "loader": ("Loader",),
    "meter": ("Meter", "PhaseMeasure", "TimelinePoint"),
    "part": ("Part",),
    "pinned": ("pin", "pinned_bytes"),
    "placement": ("Placement", "blob_bytes"),
    "probe": ("DeviceInfo", "default_device", "defer_npu_autoload", "devices", "parse_device"),
    "store": ("Store", "TensorInfo", "torch_dtype"),
    "stream": ("UnitStream",),
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
