"""The compiled kernels for CPUs: products that keep up with memory, and their way to 16 bits.

One copy of the weights serves both phases, in an order of their own (`native/kernels.cpp`); scales
keep the type in which they are stored, zero points are exact in it, and sums are in fp32: the
weights are `(q - zero) * scale` without a rounding in between.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..huge_pages import in_huge_pages
from ..native import NotBuilt, Processor, built, not_offered, processor
from ..phase import Phase
from ..scratch import Scratch
from . import Problem
from .reference import dequantize

JOINS = {"packed": 0, "scales_and_zeros": 0}

BLOCK = 16
"""Outputs that lie together."""

FLOAT16, OFFSETS, GATED, EIGHT, SIXTEEN, STORED = 1, 2, 4, 8, 16, 32
"""Of which type pairs are, what the second is, what is made of the outputs, how many bits weights
have that are not packed, and that they are in the order of a file: as in `native/product.h`."""

_SIGNATURES = {
    "four_bits": "pnnnnppippup",
    "four_bits_many": "pnnnnppippnup",
    "four_bits_stored": "pnnnnpipnup",
    "four_bits_many_stored": "pnnnnpipnnup",
    "eight_bits": "pnnnpppup",
    "sixteen_bits": "pnnpppup",
    "layer": "ppppppnnpup",
    "from_file": "pppinnnppup",
    "from_rows": "pnnpup",
}
_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_int64,
    "i": ctypes.c_int,
    "u": ctypes.c_uint,
}


class Library:
    """The library loaded, and the threads that torch computes with."""

    def __init__(self, path: Path, team: int) -> None:
        functions = ctypes.CDLL(str(path))
        self._team = team
        self._functions: dict[str, Callable[..., None]] = {}
        for name, types in _SIGNATURES.items():
            function = functions[f"lowvram_{name}"]
            function.argtypes, function.restype = [_TYPES[each] for each in types], None
            self._functions[name] = function

    def call(self, name: str, *arguments: int | None) -> None:
        """`lowvram_<name>` of numbers and addresses, on as many threads as torch would use."""
        self._functions[name](*arguments, torch.get_num_threads(), self._team)


def refusal(problem: Problem) -> str | None:
    """Why this kernel cannot do `problem`; None if it can. Builds the library where it may."""
    if problem.dtype != torch.bfloat16:
        return f"activations are in bfloat16, not in {problem.dtype}"
    if problem.outputs % BLOCK or problem.group % BLOCK or problem.inputs % problem.group:
        return f"{problem.outputs} outputs are no multiple of {BLOCK}"
    refused = not_offered(problem.inputs * problem.outputs)
    if refused is not None:
        return refused
    found = library(processor())
    return found if isinstance(found, str) else None


@cache
def library(kind: Processor | None) -> Library | str:
    """The library for a kind of processor, or why there is none; tried once. The plan that counted
    on it is made already, so that a refusal is told here as well."""
    if kind is None:
        return "the processor is of no known kind"
    try:
        found = _loaded(kind)
        if _right():
            return found
        refused = "they do not compute what they should: another compiler (CXX) may build better"
    except (NotBuilt, OSError, AttributeError) as error:
        refused = str(error)
    warnings.warn(f"compiled kernels are not used: {refused}", stacklevel=2)
    return refused


@cache
def _loaded(kind: Processor) -> Library:
    return Library(built(kind), _team())


def _right() -> bool:
    """Whether small sums and weights, which 16 bits hold exactly, are what they should be."""
    inputs, outputs = 64, 4 * BLOCK
    words = torch.arange((inputs + 2) * outputs // 8, device="cpu").mul_(0x9E3779B1)
    qweight, qzeros = words.to(torch.int32).view(-1, outputs // 8).split((inputs, 2))
    scales = torch.arange(2 * outputs, device="cpu").remainder_(4).view(2, -1).half() / 2
    wanted = dequantize(qweight, qzeros, scales, inputs // 2)
    x = torch.arange(inputs, device="cpu").sub_(20).bfloat16().unsqueeze(0)
    held = prepare(qweight, qzeros, scales, inputs // 2)
    sums = run(x, held, None, inputs // 2, "decode", Scratch())
    ones = torch.eye(inputs, device="cpu").bfloat16()
    weights = run(ones, held, None, inputs // 2, "prefill", Scratch())
    exact = (x.float() @ wanted).bfloat16()
    return torch.equal(sums, exact) and torch.equal(weights, wanted.bfloat16())


def _team() -> int:
    """The function that runs work on the threads torch has: a second set would be in their way.

    Raises:
        NotBuilt: this torch has no threads that can be shared.
    """
    lib = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Looked up in what that library itself was linked with, also where there are several.
        function = ctypes.CDLL(str(lib)).GOMP_parallel
    except (OSError, AttributeError) as error:
        raise NotBuilt(f"torch's own threads cannot be used: {error}") from error
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def loaded() -> Library:
    """The library, where a kernel was chosen that computes with it."""
    kind = processor()
    assert kind is not None  # or the kernel would have refused
    return _loaded(kind)


def prepare(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int) -> dict[str, Tensor]:
    """Stored tensors -> uint8 [N/16, 8 K], and [N/16, K/g, 2, 16] of the scales' type."""
    inputs, outputs = qweight.shape[0], scales.shape[1]
    held = empty(inputs, outputs, group, scales.dtype, qweight.device)
    packed, pairs = held
    stored = [tensor.contiguous() for tensor in (qweight, qzeros, scales)]
    form = FLOAT16 if scales.dtype == torch.float16 else 0
    addresses = [tensor.data_ptr() for tensor in (*stored, packed, pairs)]
    shape = (inputs, outputs, group)
    loaded().call("from_file", *addresses[:3], form, *shape, *addresses[3:])
    return {"packed": packed, "scales_and_zeros": pairs}


def empty(
    inputs: int, outputs: int, group: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Room for the weights of a linear, and for what goes with each of its groups."""
    blocks = outputs // BLOCK
    packed = in_huge_pages(
        torch.empty(blocks, BLOCK * inputs // 2, dtype=torch.uint8, device=device)
    )
    pairs = torch.empty(blocks, inputs // group, 2, BLOCK, dtype=dtype, device=device)
    return packed, pairs


def run(
    x: Tensor,
    held: dict[str, Tensor],
    bias: Tensor | None,
    group: int,
    phase: Phase,
    scratch: Scratch,
) -> Tensor:
    """x bfloat16 [M, K] -> bfloat16 [M, N]. It takes no scratch."""
    packed, pairs = held["packed"], held["scales_and_zeros"]
    form = FLOAT16 if pairs.dtype == torch.float16 else 0
    return product(x, packed, pairs, form, group, bias, phase)


def gated(
    x: Tensor,
    held: dict[str, Tensor],
    bias: Tensor | None,
    group: int,
    scratch: Scratch | None = None,
) -> Tensor:
    """bfloat16 [M, K] -> `silu(first half) * second half` of the outputs, bfloat16 [M, N / 2];
    rounded where the operations one by one would be. It takes no scratch."""
    pairs = held["scales_and_zeros"]
    form = GATED | (FLOAT16 if pairs.dtype == torch.float16 else 0)
    return product(x, held["packed"], pairs, form, group, bias)


def product(
    x: Tensor,
    packed: Tensor,
    pairs: Tensor,
    form: int,
    group: int,
    bias: Tensor | None,
    phase: Phase = "decode",
) -> Tensor:
    """bfloat16 [M, K] times prepared weights -> bfloat16 [M, N]; rounded once, with the bias. In
    decode weights are read once for eight rows; in prefill, where nothing may be gated, for all."""
    blocks, width = packed.shape
    many = phase == "prefill"
    rows = rows_of(x, width // (BLOCK // 2), apart=many)
    count, inputs = rows.shape
    outputs = blocks * BLOCK
    out = rows.new_empty(count, outputs // 2 if form & GATED else outputs)
    loaded().call(
        "four_bits_many" if many else "four_bits",
        rows.data_ptr(),
        count,
        inputs,
        outputs,
        group,
        packed.data_ptr(),
        pairs.data_ptr(),
        form,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *((rows.stride(0),) if many else ()),
    )
    return out


def product_of_bytes(x: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """bfloat16 [M, K] times int8 [N, K], row by row times bfloat16 [N] -> bfloat16 [M, N]."""
    rows = rows_of(x, weights.shape[1])
    out = x.new_empty(len(x), len(weights))
    shape = (len(x), x.shape[1], len(weights))
    addresses = [tensor.data_ptr() for tensor in (rows, weights, scales, out)]
    loaded().call("eight_bits", addresses[0], *shape, *addresses[1:])
    return out


def product_of_16_bits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row of bfloat16 [.., K] times bfloat16 [N, K], plus a bias -> [.., N]; rounded once."""
    outputs, inputs = weight.shape
    row = rows_of(x.reshape(-1, x.shape[-1]), inputs)
    held = [weight] if bias is None else [weight, bias]
    if len(row) != 1 or any(t.dtype != x.dtype or not t.is_contiguous() for t in held):
        found = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (x, *held))
        raise TypeError(f"{found}; wanted one row and weights of bfloat16 in one piece")
    out = x.new_empty(*x.shape[:-1], outputs)
    addresses = [None if t is None else t.data_ptr() for t in (weight, bias, out)]
    loaded().call("sixteen_bits", row.data_ptr(), inputs, outputs, *addresses)
    return out


def rows_of(x: Tensor, inputs: int, *, apart: bool = False) -> Tensor:
    """What the library may read: it is given addresses alone. Rows may lie `apart` from each other
    where it is told how far: the copy of a chunk's rows would be the peak of a layer."""
    if x.dtype != torch.bfloat16 or x.shape[1] != inputs or not x.is_cpu:
        found = f"{x.dtype} {list(x.shape)} on {x.device}"
        raise TypeError(f"{found}; wanted bfloat16 [rows, {inputs}] on the cpu")
    return x if apart and x.stride(1) == 1 and x.stride(0) >= inputs else x.contiguous()


def pack_rows(q: Tensor, packed: Tensor) -> None:
    """uint8 [n, K] of 0..15 -> uint8 [n / 16, 8 K]."""
    rows = q.contiguous()
    loaded().call("from_rows", rows.data_ptr(), rows.shape[1], len(rows), packed.data_ptr())
