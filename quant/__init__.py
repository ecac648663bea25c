"""Weights of 4 and 8 bits: the AWQ layout, linears that compute with them, and their kernels.

Knows nothing of budgets or models. Names that need torch are imported when first asked for, so
that importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .awq import dense_layer, quantize_layer
    from .head import RoundedHead
    from .joined import apply_all, apply_gated, apply_joined, join
    from .kernels import Kernel, Problem, select
    from .linear import QuantLinear
    from .native_layer import NativeLayer
    from .packing import GROUPS, Packed, dequantize, pack, quantize, unpack
    from .phase import current_phase, kernel_phase
    from .plain import PlainLinear
    from .published import quantization_config
    from .rounded import RoundedLinear
    from .scratch import Scratch
    from .search_layer import (
        Geometry,
        LayerInputs,
        LayerResult,
        LinearReport,
        SearchSettings,
        Step,
    )
    from .sizes import (
        AS_STORED,
        HEAD_OPTIONS,
        STREAMING,
        HeadBits,
        HeadChoice,
        KernelChoice,
        KernelName,
        choose_head,
        eight_bit_scratch_bytes,
        head_bytes,
        linear_bytes,
        loading_bytes,
        native_layers,
        preferred_kernel,
        rounded_bytes,
        rounding_bytes,
        scratch_bytes,
    )

__all__ = [
    "AS_STORED",
    "GROUPS",
    "HEAD_OPTIONS",
    "STREAMING",
    "Geometry",
    "HeadBits",
    "HeadChoice",
    "Kernel",
    "KernelChoice",
    "KernelName",
    "LayerInputs",
    "LayerResult",
    "LinearReport",
    "NativeLayer",
    "Packed",
    "PlainLinear",
    "Problem",
    "QuantLinear",
    "RoundedHead",
    "RoundedLinear",
    "Scratch",
    "SearchSettings",
    "Step",
    "apply_all",
    "apply_gated",
    "apply_joined",
    "choose_head",
    "current_phase",
    "dense_layer",
    "dequantize",
    "eight_bit_scratch_bytes",
    "head_bytes",
    "join",
    "kernel_phase",
    "linear_bytes",
    "loading_bytes",
    "native_layers",
    "pack",
    "preferred_kernel",
    "quantization_config",
    "quantize",
    "quantize_layer",
    "rounded_bytes",
    "rounding_bytes",
    "scratch_bytes",
    "select",
    "unpack",
]

_HOME = {
    "awq": ("dense_layer", "quantize_layer"),
    "head": ("RoundedHead",),
    "kernels": ("Kernel", "Problem", "select"),
    "joined": ("apply_all", "apply_gated", "apply_joined", "join"),
    "linear": ("QuantLinear",),
    "native_layer": ("NativeLayer",),
    "packing": ("GROUPS", "Packed", "dequantize", "pack", "quantize", "unpack"),
    "phase": ("current_phase", "kernel_phase"),
    "plain": ("PlainLinear",),
    "published": ("quantization_config",),
    "rounded": ("RoundedLinear",),
    "search_layer": (
        "Geometry",
        "LayerInputs",
        "LayerResult",
        "LinearReport",
        "SearchSettings",
        "Step",
    ),
    "scratch": ("Scratch",),
    "sizes": (
        "AS_STORED",
        "HEAD_OPTIONS",
        "STREAMING",
        "HeadBits",
        "HeadChoice",
        "KernelChoice",
        "KernelName",
        "choose_head",
        "head_bytes",
        "eight_bit_scratch_bytes",
        "linear_bytes",
        "loading_bytes",
        "native_layers",
        "preferred_kernel",
        "rounded_bytes",
        "rounding_bytes",
        "scratch_bytes",
    ),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE[name]}", __name__), name)
