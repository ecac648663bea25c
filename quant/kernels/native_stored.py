"""The compiled kernels on weights as the file has them: layers that stream run as they arrive.

What a group has for a few outputs is brought into the kernels' order in the nearest cache, and
multiplied by the same code (`native/stored.h`): every number is that of a layer which stays.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..native import processor
from ..phase import Phase
from ..scratch import Scratch
from . import Problem, Stored, native


class _File(ctypes.Structure):
    """`File` of `native/file_order.h`."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("qweight", "qzeros", "scales", "bias"))


def refusal(problem: Problem) -> str | None:
    """Why this kernel cannot do `problem`; None if it can. Builds the library where it may."""
    refused = native.refusal(problem)
    if refused is not None:
        return refused
    return None if _agrees(processor()) else "they do not compute what they should"


@cache
def _agrees(kind: object) -> bool:
    """Whether small products are those of prepared weights, on a processor of that kind; tried
    once. A plan that counted on them is made already, so that a refusal is told here as well."""
    inputs, outputs, group = 64, 4 * native.BLOCK, 32
    words = torch.arange((inputs + 2) * outputs // 8, device="cpu").mul_(0x9E3779B1)
    qweight, qzeros = words.to(torch.int32).view(-1, outputs // 8).split((inputs, 2))
    scales = torch.arange(1, 2 * outputs + 1, device="cpu").view(2, -1).half() / 64
    stored = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    held = native.prepare(qweight, qzeros, scales, group)
    x = torch.arange(9 * inputs, device="cpu").remainder_(23).sub_(11).bfloat16().view(9, -1)
    phases: tuple[Phase, ...] = ("decode", "prefill")
    for phase in phases:
        found = run(x, stored, None, group, phase, Scratch())
        wanted = native.run(x, held, None, group, phase, Scratch())
        if not torch.equal(found, wanted):
            warnings.warn("compiled kernels are not used for layers that stream", stacklevel=2)
            return False
    return True


def run(
    x: Tensor,
    held: dict[str, Tensor],
    bias: Tensor | None,
    group: int,
    phase: Phase,
    scratch: Scratch,
) -> Tensor:
    """x bfloat16 [M, K] -> bfloat16 [M, N]; `held` is what the file has. It takes no scratch."""
    return beside(x, [(held, bias)], group, phase)


def beside(x: Tensor, linears: Sequence[Stored], group: int, phase: Phase) -> Tensor:
    """x bfloat16 [M, K] -> bfloat16 [M, sum of N]: the outputs of all linears side by side."""
    widths = [held["scales"].shape[1] for held, _ in linears]
    many = phase == "prefill"
    rows = native.rows_of(x, len(linears[0][0]["qweight"]), apart=many)
    out = rows.new_empty(len(rows), sum(widths))
    name = "four_bits_many_stored" if many else "four_bits_stored"
    for linear, into in zip(linears, out.split(widths, dim=1), strict=True):
        _call(name, rows, [linear], group, into)
    return out


def gated(x: Tensor, gate: Stored, up: Stored, group: int) -> Tensor:
    """x bfloat16 [M, K] -> `silu(gate) * up`, bfloat16 [M, N], as `native.gated` rounds it."""
    rows = native.rows_of(x, len(gate[0]["qweight"]))
    out = rows.new_empty(len(rows), gate[0]["scales"].shape[1])
    _call("four_bits_stored", rows, [gate, up], group, out)
    return out


def _call(name: str, rows: Tensor, linears: Sequence[Stored], group: int, out: Tensor) -> None:
    """Into `out` [M, N]: the product with one linear, or with two of one shape, gated."""
    held = linears[0][0]
    gates = native.GATED if len(linears) == 2 else 0
    form = gates | (native.FLOAT16 if held["scales"].dtype == torch.float16 else 0)
    files = (_File * len(linears))(*(_file(*linear) for linear in linears))
    outputs = sum(held["scales"].shape[1] for held, _ in linears)
    shape = (len(rows), rows.shape[1], outputs, group)
    native.loaded().call(
        name,
        rows.data_ptr(),
        *shape,
        ctypes.addressof(files),
        form,
        out.data_ptr(),
        out.stride(0),
        *((rows.stride(0),) if name == "four_bits_many_stored" else ()),
    )


def _file(held: dict[str, Tensor], bias: Tensor | None) -> _File:
    """
    Raises:
        TypeError: tensors that do not lie in one piece: the library is given addresses alone.
    """
    tensors = [held[name] for name in ("qweight", "qzeros", "scales")]
    for tensor in tensors:
        if not tensor.is_contiguous():
            found = f"{list(tensor.shape)} with strides {tensor.stride()}"
            raise TypeError(f"{found}; wanted stored tensors in one piece")
    return _File(*(t.data_ptr() for t in tensors), None if bias is None else bias.data_ptr())
