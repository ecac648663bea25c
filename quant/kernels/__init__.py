"""The kernels a 4-bit linear can compute with: each says what it refuses, and why."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from ..phase import Phase
from ..scratch import Scratch
from ..sizes import AS_STORED, Asked, KernelName, columns_within, preferred_kernel


@dataclass(frozen=True)
class Problem:
    """A linear to compute: device type, type of the activations, shape, group size."""

    device: str
    dtype: torch.dtype
    inputs: int
    outputs: int
    group: int


Stored = tuple[dict[str, Tensor], Tensor | None]
"""A linear as the file has it: `qweight`, `qzeros` and `scales`, and its bias."""


@dataclass(frozen=True)
class Beside:
    """What a kernel for stored tensors does of several linears of one input in one go.

    `outputs(x, linears, group, phase)` gives the outputs of all side by side, [M, sum of N];
    `gated(x, gate, up, group)` silu of the one's times the other's, while decoding.
    """

    outputs: Callable[[Tensor, Sequence[Stored], int, Phase], Tensor]
    gated: Callable[[Tensor, Stored, Stored, int], Tensor]


@dataclass(frozen=True)
class Kernel:
    """The kernel chosen for a problem, and why, in words for the plan.

    `prepare(qweight, qzeros, scales, group)` makes the tensors that are held;
    `run(x, held, bias, group, phase, scratch)` multiplies x [M, K] by the weights and adds the
    bias; `joins` gives, for every held tensor, the axis along which several linears of one input
    lie side by side as one, and is empty where there is nothing to gain from that. While decoding,
    `gated(x, held, bias, group, scratch)` multiplies silu of the first half of the outputs by the
    second, where there is anything to gain. `beside` is of kernels for stored tensors alone, whose
    linears are not joined.
    """

    name: KernelName
    reason: str
    prepare: Callable[[Tensor, Tensor, Tensor, int], dict[str, Tensor]]
    run: Callable[[Tensor, dict[str, Tensor], Tensor | None, int, Phase, Scratch], Tensor]
    joins: dict[str, int]
    gated: Callable[[Tensor, dict[str, Tensor], Tensor | None, int, Scratch], Tensor] | None = None
    beside: Beside | None = None


def select(problem: Problem, asked: Asked = "auto") -> Kernel:
    """The fastest kernel that can do `problem`, or the reference where that is asked for."""
    from . import ascend, cpu, native, reference, tinygemm, triton

    modules: dict[KernelName, ModuleType] = {
        "cpu": cpu,
        "native": native,
        "tinygemm": tinygemm,
        "ascend": ascend,
        "triton": triton,
        "reference": reference,
    }
    dtype = str(problem.dtype).removeprefix("torch.")
    weights = problem.inputs * problem.outputs
    name, reason = preferred_kernel(problem.device, dtype, asked, weights)
    while (refused := modules[name].refusal(problem)) is not None:
        reason = f"the {name} kernel cannot: {refused}"
        name = "cpu" if name == "native" else "reference"
    module = modules[name]
    gated = getattr(module, "gated", None)
    prepare = module.prepare
    if module is ascend:
        prepare = functools.partial(prepare, dtype=problem.dtype)
    return Kernel(name, reason, prepare, module.run, module.JOINS, gated)


def select_stored(problem: Problem, asked: Asked = "auto") -> Kernel:
    """The same for tensors that are to stay as the file has them: of a layer that streams."""
    from . import ascend_stored, native_stored, reference

    dtype = str(problem.dtype).removeprefix("torch.")
    name, reason = preferred_kernel(problem.device, dtype, asked, problem.inputs * problem.outputs)
    if name == "ascend" and ascend_stored.refusal(problem) is None:
        return Kernel(name, reason, reference.prepare, ascend_stored.run, joins={})
    refused = native_stored.refusal(problem) if name == "native" else None
    if name == "native" and refused is None:
        beside = Beside(native_stored.beside, native_stored.gated)
        return Kernel(name, reason, reference.prepare, native_stored.run, joins={}, beside=beside)
    chosen = select(problem, asked) if problem.device == "cuda" or refused is not None else None
    if chosen is not None and chosen.name in AS_STORED:
        return chosen
    if refused is not None:
        # The plan counted on kernels that take less than the reference does by itself.
        step = columns_within(problem.inputs, problem.outputs, problem.group, "native")
        run = functools.partial(reference.run, step=step)
        return Kernel(
            "reference", f"the {name} kernel cannot: {refused}", reference.prepare, run, {}
        )
    return select(replace(problem, device="meta"), asked)
