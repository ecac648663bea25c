"""The kernels a 4-bit linear can compute with: each says what it refuses, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from ..phase import Phase

Asked = Literal["auto", "reference"]


@dataclass(frozen=True)
class Problem:
    """A linear to compute: device type, type of the activations, shape, group size."""

    device: str
    dtype: torch.dtype
    inputs: int
    outputs: int
    group: int


@dataclass(frozen=True)
class Kernel:
    """The kernel chosen for a problem, and why, in words for the plan.

    `prepare(qweight, qzeros, scales, group)` makes the tensors that are held;
    `run(x, held, bias, group, phase)` multiplies x [M, K] by the weights and adds the bias.
    """

    name: str
    reason: str
    prepare: Callable[[Tensor, Tensor, Tensor, int], dict[str, Tensor]]
    run: Callable[[Tensor, dict[str, Tensor], Tensor | None, int, Phase], Tensor]


def select(problem: Problem, asked: Asked = "auto") -> Kernel:
    """The fastest kernel that can do `problem`, or the reference where that is asked for."""
    from . import cpu, reference

    if asked == "reference":
        return _kernel(reference, "asked for")
    refused = cpu.refusal(problem)
    if refused is None:
        return _kernel(cpu, "bfloat16 on the CPU: 4-bit product to decode, 16-bit to prefill")
    return _kernel(reference, f"the cpu kernel cannot: {refused}")


def _kernel(module: ModuleType, reason: str) -> Kernel:
    return Kernel(module.NAME, reason, module.prepare, module.run)
