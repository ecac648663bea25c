"""Ascend: torch_npu's product of 16-bit activations and 4-bit weights, in both phases.

`y = x @ ((weight + offset) * scale) + bias`: with weights `q - 8`, as signed integers of 4 bits,
and offsets `8 - zero` that is `x @ ((q - zero) * scale) + bias`. Weights are int32 [K, N/8],
contiguous, output i of eight in nibble i from the lowest; scales and offsets have the type of x.
That is the file's own orientation, so that every word is turned where it lies: on the host, since
CANN has no shifts of its own, and since `npu_convert_weight_to_int4pack` packs on the host as well
and wants eight times the bytes for it.

Sources: Ascend/op-plugin, docs/zh/custom_APIs/torch_npu/torch_npu-npu_weight_quant_batchmatmul.md
and op_plugin/ops/opapi/WeightQuantBatchMatmulV2KernelNpuOpApi.cpp (limits),
ConvertWeightToINT4PackKernelNpuOpApi.cpp (order of nibbles).
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from .. import chips
from ..phase import Phase
from ..scratch import Scratch
from ..sizes import PIECE_WEIGHTS
from . import Problem
from .reference import unpack
from .words import in_order

JOINS: dict[str, int] = {}

MOST = 65_535
"""Inputs and outputs of one product, at most."""

SIGNS = 0x88888888 - (1 << 32)
"""Turns the highest bit of all eight nibbles of an int32: 0..15 -> -8..7."""

_TRIED = 0x76549810
"""Nibbles 0, 1, -8, -7, 4, 5, 6, 7, the first in the lowest."""


def refusal(problem: Problem) -> str | None:
    """Why this kernel cannot do `problem`; None if it can. The operator is tried on a matrix of
    that shape, once: what it raises or computes wrong is the reason."""
    if problem.inputs > MOST:
        return f"{problem.inputs} inputs are more than {MOST}"
    if problem.group % 32:
        return f"groups of {problem.group} inputs are no multiple of 32"
    if chips.package() is None:
        return "no NPU is open"
    refused = chips.refusal()
    if refused is None:
        refused = _trial(problem)
        if refused is not None:
            _tell(problem, refused)
    return refused


def prepare(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int, *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Stored tensors -> int32 [K, N/8] in the operator's order, in place, and [2, K/g, N] of scales
    and offsets in `dtype`. More outputs than one product takes: both flat, piece after piece."""
    inputs, outputs = qweight.shape[0], scales.shape[1]
    pieces = column_pieces(outputs)
    qweight = qweight.contiguous()
    packed = qweight if len(pieces) == 1 else qweight.new_empty(qweight.numel())
    rows = max(PIECE_WEIGHTS["ascend"] // outputs, 1)
    for start in range(0, inputs, rows):
        some = slice(start, start + rows)
        words = in_order(qweight[some].cpu()) ^ SIGNS
        for columns in pieces:
            place = _piece(packed, columns, inputs, 8)
            place[some].copy_(words[:, columns.start // 8 : columns.stop // 8])
    pairs = torch.stack((in_type(scales.cpu(), dtype), (8 - unpack(qzeros.cpu())).to(dtype)))
    held = _one_after_another(pairs, pieces).to(qweight.device)
    return {"packed": packed, "scales_and_offsets": held}


def run(
    x: Tensor,
    held: dict[str, Tensor],
    bias: Tensor | None,
    group: int,
    phase: Phase,
    scratch: Scratch,
) -> Tensor:
    """x [M, K] -> [M, N], in the type of x."""
    packed, pairs = held["packed"], held["scales_and_offsets"]
    rows, inputs = x.contiguous(), x.shape[1]
    outputs = packed.numel() * 8 // inputs
    pieces = column_pieces(outputs)
    if len(pieces) == 1 and len(x):  # the operator takes no empty tensors
        return product(rows, packed, pairs, bias, group)
    result = x.new_empty(len(x), outputs)
    for columns in pieces:
        words = _piece(packed, columns, inputs, 8)
        steps = _piece(pairs, columns, 2 * (inputs // group), 1).unflatten(0, (2, -1))
        added = None if bias is None else bias[columns]
        count = max(PIECE_WEIGHTS["ascend"] // (columns.stop - columns.start), 1)
        for start in range(0, len(x), count):
            some = slice(start, start + count)
            result[some, columns] = product(rows[some], words, steps, added, group)
    return result


def column_pieces(outputs: int) -> list[slice]:
    """Outputs in as few pieces as products take, each but the last a multiple of 64."""
    count = -(-outputs // MOST)
    step = -(-outputs // count // 64) * 64
    return [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]


def small_trial() -> str | None:
    """Why the operator fails on a small matrix; None if it computes what it should, or if the
    device is too full to find out."""
    try:
        return _trial(Problem("npu", torch.float16, 256, 64, 64))
    except RuntimeError as error:
        if not _is_full(error):
            raise
        return None


def _is_full(error: Exception) -> bool:
    """Whether the device has no room: what allocates beside torch says so in words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def _one_after_another(pairs: Tensor, pieces: list[slice]) -> Tensor:
    """[2, K/g, N] -> the same, or flat where there are several pieces of columns."""
    if len(pieces) == 1:
        return pairs.contiguous()
    return torch.cat([pairs[:, :, columns].flatten() for columns in pieces])


def _piece(flat: Tensor, columns: slice, rows: int, per_element: int) -> Tensor:
    """The rows of one piece of columns, contiguous, where pieces follow one another."""
    first, last = (rows * place // per_element for place in (columns.start, columns.stop))
    return flat.view(-1)[first:last].view(rows, -1)


def in_type(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the type of the activations; none becomes infinite by that."""
    if dtype == torch.float16 != scales.dtype:
        largest = torch.finfo(dtype).max
        scales = scales.float().clamp_(-largest, largest)
    return scales.to(dtype)


def product(x: Tensor, weight: Tensor, pairs: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """One call of the operator: contiguous x [M, K] and weight [K, N/8], pairs [2, K/g, N]."""
    operator: Any = getattr(torch.ops.npu, chips.OPERATOR)
    out: Tensor = operator(
        x,
        weight,
        antiquant_scale=pairs[0],
        antiquant_offset=pairs[1],
        bias=bias.float() if bias is not None and x.dtype == torch.bfloat16 else bias,
        # One group for all inputs is another mode of the operator, with no group size in it.
        antiquant_group_size=group if len(weight) > group else 0,
    )
    return out


@functools.cache
def _trial(problem: Problem) -> str | None:
    """Multiply two unit vectors by known weights. What it takes is gone before it returns.

    Raises what says that the device is full, so that it is not taken for the operator's failure.
    """
    inputs, outputs, groups = problem.inputs, problem.outputs, problem.inputs // problem.group
    device = torch.device(problem.device)
    host: Any = {"dtype": problem.dtype, "device": "cpu"}
    steps = torch.arange(1, groups + 1, device="cpu").remainder_(7).add_(1).to(problem.dtype)
    rows = torch.zeros(2, inputs, **host)
    rows[0, 0] = rows[1, -1] = 1
    nibbles = torch.tensor((0, 1, -8, -7, 4, 5, 6, 7), **host)
    wanted = torch.stack([(nibbles + 3) * steps[group] for group in (0, -1)])
    pairs = torch.stack((steps, torch.full_like(steps, 3))).unsqueeze(2).expand(-1, -1, outputs)
    held = {
        "packed": torch.full((inputs, outputs // 8), _TRIED, dtype=torch.int32, device=device),
        "scales_and_offsets": _one_after_another(pairs, column_pieces(outputs)).to(device),
    }
    try:
        found = run(rows.to(device), held, None, problem.group, "decode", Scratch()).cpu()
    except (AttributeError, RuntimeError, TypeError) as error:
        if _is_full(error):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{chips.OPERATOR} fails: {first[:160]}"
    if not torch.equal(found, wanted.repeat(1, outputs // 8)):
        return f"{chips.OPERATOR} does not compute what is documented"
    return None


def _tell(problem: Problem, refused: str) -> None:
    """For plans from here on, and once now: this one was made before."""
    shape = f"{problem.inputs} x {problem.outputs}"
    if shape not in chips.refused_shapes:
        chips.refused_shapes[shape] = refused
        warnings.warn(f"linears of {shape} are de-quantized: {refused}", stacklevel=2)
