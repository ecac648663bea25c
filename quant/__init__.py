"""4-bit weights: the AWQ layout, a linear that computes with it, and the kernels it chooses from.

Knows nothing of budgets or models. Names that need torch are imported when first asked for, so
that importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .packing import GROUPS, Packed, dequantize, pack, quantize, unpack

__all__ = [
    "GROUPS",
    "Packed",
    "dequantize",
    "pack",
    "quantize",
    "unpack",
]

_HOME = {
    "packing": ("GROUPS", "Packed", "dequantize", "pack", "quantize", "unpack"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE[name]}", __name__), name)
