"""Our call of Ascend's operator against what two releases of torch_npu declare."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from simdevice import operator
from torch import Tensor

from lowvram.quant import Scratch, chips, quantize
from lowvram.quant.kernels import ascend

SCHEMAS = operator.schemas()
RELEASES = pytest.mark.parametrize("release", SCHEMAS)


def arguments(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """What the kernel calls the operator with."""
    seen: list[tuple[Any, Any]] = []

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((args, kwargs))
        return torch.zeros(3, 64, dtype=dtype)

    monkeypatch.setattr(torch.ops.npu, operator.NAME, recorded, raising=False)
    multiply(dtype)
    return seen[0]


def multiply(dtype: torch.dtype) -> Tensor:
    made = quantize(np.sin(np.arange(64 * 128)).reshape(64, 128).astype(np.float32), 32)
    held = ascend.prepare(*map(torch.from_numpy, made), 32, dtype=dtype)
    bias = torch.ones(64, dtype=dtype)
    return ascend.run(torch.ones(3, 128, dtype=dtype), held, bias, 32, "prefill", Scratch())


def test_the_releases_are_two_and_differ() -> None:
    assert chips.OPERATOR == operator.NAME
    assert list(SCHEMAS) == ["2.7.1.post2", "2.13.0"]
    assert len(set(SCHEMAS.values())) == 2


@RELEASES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_argument_is_declared(
    release: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, kwargs = arguments(dtype, monkeypatch)
    declared = torch._C.parse_schema(f"npu::{SCHEMAS[release]}").arguments
    by_name = {argument.name: argument for argument in declared}
    names = [argument.name for argument in declared]
    bound = dict(zip(names, args, strict=False)) | kwargs
    assert len(bound) == len(args) + len(kwargs), "an argument is given twice"
    assert names[:4] == ["x", "weight", "antiquant_scale", "antiquant_offset"]
    assert set(bound) <= set(names)
    for name, argument in by_name.items():
        assert name in bound or argument.has_default_value(), f"{name} is not given"
        assert not argument.kwarg_only or name not in names[: len(args)]
    for name, value in bound.items():
        kind = str(by_name[name].type)
        assert isinstance(value, Tensor if "Tensor" in kind else int), f"{name} is {kind}"
    assert (args[0].shape, args[0].dtype) == ((3, 128), dtype)
    assert (args[1].shape, args[1].dtype) == ((128, 8), torch.int32)
    assert args[1].is_contiguous() and kwargs["bias"].is_contiguous()
    assert kwargs["antiquant_scale"].shape == kwargs["antiquant_offset"].shape == (4, 64)
    assert kwargs["antiquant_scale"].dtype == kwargs["antiquant_offset"].dtype == dtype
    assert kwargs["bias"].dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert kwargs["antiquant_group_size"] == 32


@RELEASES
def test_the_dispatcher_takes_the_call(release: str) -> None:
    """Torch itself binds it, to the schema as it is published."""
    with operator.defined("CPU", SCHEMAS[release]):
        out = multiply(torch.float16)
        assert operator.calls == [(3, 128, 64)]
    summed = np.sin(np.arange(64 * 128)).reshape(64, 128).sum(axis=1) + 1
    assert np.abs(out.numpy() - summed).max() < 0.5  # half a step of 2/15 for 128 weights
    assert not hasattr(torch.ops.npu, operator.NAME)
