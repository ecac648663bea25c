"""What an Ascend device that is open can compute with, by its name and by trying. No torch.

Nothing here imports torch_npu: it is there once an NPU was asked for, and only then asked.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

OPERATOR = "npu_weight_quant_batchmatmul"
"""The product of 16-bit activations and 4-bit weights in torch_npu."""

WITHOUT = ("Ascend310", "Ascend910A", "Ascend910Pro", "Ascend910Premium")
"""How the names begin of chips that have the product for 8-bit weights only (310P), or not at all.

Names are those that `torch_npu.npu.get_device_name()` gives; they are listed in Ascend/pytorch,
torch_npu/csrc/core/npu/NpuVariables.cpp. What each can do: the operator's own documentation
(Ascend/op-plugin, docs/zh/custom_APIs/torch_npu).
"""

FIRST_910 = "Ascend910B"
"""The whole name of a chip like those above; with a digit after it, it is one of the second kind,
which has the product."""

refused_shapes: dict[str, str] = {}
"""Linears that were tried on the device and refused, by their shape in words, and why."""


def package() -> Any | None:
    """torch_npu, if an NPU was opened in this process."""
    return sys.modules.get("torch_npu")


def refusal() -> str | None:
    """Why the open NPU has no 4-bit product; None if it has, or if none is open to be asked."""
    torch_npu = package()
    if torch_npu is None:
        return None
    name = str(torch_npu.npu.get_device_name())
    if name == FIRST_910 or name.startswith(WITHOUT):
        return f"CANN has no product with grouped 4-bit weights on {name}"
    if not hasattr(torch_npu, OPERATOR):
        return f"this torch_npu has no {OPERATOR}"
    # Torch is there, since torch_npu is.
    trial = importlib.import_module(f"{__package__}.kernels.ascend")
    found: str | None = trial.small_trial()
    return found
