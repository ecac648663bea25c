"""torch_npu's product of 16-bit activations and 4-bit weights, emulated from its documentation:
`y = x @ ((weight + offset) * scale) + bias`, with its limits and what it says of them.

Sources: Ascend/op-plugin, docs/zh/custom_APIs/torch_npu/torch_npu-npu_weight_quant_batchmatmul.md
and op_plugin/ops/opapi/WeightQuantBatchMatmulV2KernelNpuOpApi.cpp.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

NAME = "npu_weight_quant_batchmatmul"
PUBLISHED = Path(__file__).parents[1] / "quant" / "data" / "torch_npu_schemas.json"
MOST = 65_535

calls: list[tuple[int, ...]] = []
"""Rows, inputs and outputs of every product since `defined`."""


def schemas(name: str = NAME) -> dict[str, str]:
    """The published schema of an operator, by release of torch_npu."""
    found: dict[str, dict[str, str]] = json.loads(PUBLISHED.read_text())
    return {release: texts[name] for release, texts in found["schemas"].items()}


@contextmanager
def defined(key: str = "PrivateUse1", schema: str | None = None) -> Iterator[None]:
    """Inside the block torch has the operator, on the simulated device or on the `CPU`, under a
    published schema: the newest by default."""
    library = torch.library.Library("npu", "FRAGMENT")
    package = sys.modules.get("torch_npu")
    calls.clear()
    try:
        library.define(schema or list(schemas().values())[-1])
        library.impl(NAME, emulated, key)
        if package is not None:
            package.__dict__[NAME] = getattr(torch.ops.npu, NAME)
        yield
    finally:
        library._destroy()
        if package is not None:
            package.__dict__.pop(NAME, None)


def emulated(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    """16-bit x [M, K], int32 weight [K, N/8], 16-bit scale and offset [K/g, N] -> x's type [M, N].

    Weights are rounded to the type of x, as AscendAntiQuant does; sums are in fp32.
    """
    _check(x, weight, antiquant_scale, antiquant_offset, bias, antiquant_group_size)
    assert quant_scale is None and quant_offset is None
    assert inner_precise == 0 and weight_dtype is None
    host = [None if t is None else t.cpu() for t in (x, weight, antiquant_scale, antiquant_offset)]
    rows, words, scale, offset = host
    assert rows is not None and words is not None and scale is not None
    values = signed(words).float().unflatten(0, (len(scale), -1))
    if offset is not None:
        values = values + offset.float().unsqueeze(1)
    dense = (values * scale.float().unsqueeze(1)).flatten(0, 1).to(x.dtype)
    calls.append((*x.shape, dense.shape[1]))
    if bias is None:
        return (rows @ dense).to(x.device)
    return torch.addmm(bias.cpu().to(x.dtype), rows, dense).to(x.device)


def signed(words: Tensor) -> Tensor:
    """int32 [K, N/8] -> int64 [K, N] of -8..7: value i of eight in bits 4i to 4i+3, as two's
    complement."""
    nibbles = words.long().unsqueeze(-1) >> torch.arange(0, 32, 4) & 15
    return torch.where(nibbles > 7, nibbles - 16, nibbles).flatten(1)


def _check(
    x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None, group: int
) -> None:
    """What the published operator refuses, in its words where it has some."""

    def want(holds: bool, said: str) -> None:
        if not holds:
            raise RuntimeError(f"{NAME}: {said}")

    inputs, outputs = weight.shape[0], weight.shape[1] * 8
    want(x.dim() == 2 and x.numel() > 0, "x is 2-D and not empty")
    want(x.dtype in (torch.float16, torch.bfloat16), f"x is float16 or bfloat16, not {x.dtype}")
    want(weight.dtype == torch.int32, f"4-bit weights come in int32, not in {weight.dtype}")
    # One that is not contiguous is taken for a transposed one.
    want(weight.is_contiguous(), "weight is contiguous")
    want(x.shape[1] == inputs, f"The k of x and weight should be equal. but x_k_dim is {x.shape}")
    want(max(inputs, outputs) <= MOST, f"K and N are at most {MOST}, not {inputs} and {outputs}")
    want(
        group == 0 or (32 <= group <= inputs - 1 and group % 32 == 0),
        "antiquant_group_size can be either 0 or a multiple of 32 within the range 32 to "
        "weight_k_dim - 1.",
    )
    groups = -(-inputs // group) if group else 1
    for name, one in (("antiquant_scale", scale), ("antiquant_offset", offset)):
        if one is not None:
            want(one.shape == (groups, outputs), f"{name} is {tuple(one.shape)}")
            want(one.dtype == x.dtype, f"{name} has the type of x, not {one.dtype}")
    if bias is not None:
        wide = torch.float32 if x.dtype == torch.bfloat16 else torch.float16
        want(bias.dtype == wide, f"bias is {wide} where x is {x.dtype}, not {bias.dtype}")
        want(bias.is_contiguous() and bias.shape == (outputs,), "bias is contiguous, one a column")
