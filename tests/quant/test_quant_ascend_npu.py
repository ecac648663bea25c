"""Packed linears on the simulated NPU: which kernel they get, its memory, and what it refuses."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simdevice as sim
import torch
from simdevice import operator, simulated
from torch import Tensor

from lowvram.offload import Meter, open_device
from lowvram.quant import (
    Problem,
    QuantLinear,
    chips,
    linear_bytes,
    loading_bytes,
    preferred_kernel,
    quantize,
    scratch_bytes,
    select,
)

SHAPE = (256, 192, 64)


def prepare_device() -> None:
    sim.reset()
    sim.configure(limit=1 << 30, context=0)


def packed(device: str, dtype: torch.dtype, shape: tuple[int, int, int] = SHAPE) -> QuantLinear:
    inputs, outputs, group = shape
    rng = np.random.default_rng(outputs)
    made = quantize(rng.standard_normal((outputs, inputs)).astype(np.float32), group)
    layer = QuantLinear(inputs, outputs, True, group, dtype=dtype)
    for name, value in zip(("qweight", "qzeros", "scales"), made, strict=True):
        layer.get_buffer(name).copy_(torch.from_numpy(value))
    layer.get_buffer("bias").copy_(torch.from_numpy(rng.standard_normal(outputs)))
    return layer.to(device)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.cpu().double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_linear_is_computed_by_the_operator(dtype: torch.dtype) -> None:
    @simulated
    def inside() -> None:
        prepare_device()
        x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
        wanted = packed("cpu", torch.float32)(x.float())
        with operator.defined():
            layer = packed("npu", dtype)
            words = layer.qweight.data_ptr()
            layer.after_load()
            assert layer.kernel.name == "ascend" and operator.NAME in layer.kernel.reason
            assert layer.get_buffer("packed").data_ptr() == words
            operator.calls.clear()
            found = layer(x.to("npu"))
            assert operator.calls == [(6, 256, 192)]
        bound = 1e-3 if dtype == torch.float16 else 6e-3
        assert found.shape == wanted.shape and error(found, wanted) < bound
        assert sim.races() == [] and sim.host_operators() == {}

    inside()


@pytest.mark.parametrize("shape", [SHAPE, (1024, 512, 128), (96, 200, 32)])
def test_memory_is_what_is_planned(shape: tuple[int, int, int]) -> None:
    @simulated
    def inside() -> None:
        prepare_device()
        inputs, outputs, group = shape
        with operator.defined():
            layer = packed("npu", torch.bfloat16, shape)
            bias = layer.get_buffer("bias").nbytes
            before = sim.live_bytes()
            torch.npu.reset_peak_memory_stats()
            layer.after_load()
            held = sum(b.nbytes for n, b in layer.named_buffers() if n != "bias")
            assert held == linear_bytes(inputs, outputs, group, "ascend")
            peak = torch.npu.max_memory_allocated() - before
            assert 0 < peak <= loading_bytes(inputs, outputs, group, "ascend")
            x = torch.zeros(8, inputs, dtype=torch.bfloat16, device="npu")
            held = sim.live_bytes()
            torch.npu.reset_peak_memory_stats()
            out = layer(x)
            peak = torch.npu.max_memory_allocated() - held - out.nbytes
        assert peak <= scratch_bytes(inputs, outputs, "ascend", group) + 4 * bias

    inside()


def choice(dtype: torch.dtype = torch.bfloat16) -> tuple[str, str]:
    name = str(dtype).removeprefix("torch.")
    kernel = preferred_kernel("npu", name)
    assert select(Problem("npu", dtype, *SHAPE)).name == kernel.name
    return kernel


CHIPS = {
    "Ascend910B3": True,
    "Ascend910B4-1": True,
    "Ascend910_9391": True,
    "Ascend950PR": True,
    "Ascend910B": False,
    "Ascend910A": False,
    "Ascend910ProB": False,
    "Ascend910PremiumA": False,
    "Ascend310P3": False,
    "Ascend310B4": False,
}


@simulated
def test_the_chip_decides() -> None:
    prepare_device()
    with operator.defined():
        for chip, has_it in CHIPS.items():
            torch.npu.get_device_name = lambda index=None, chip=chip: chip
            name, reason = choice(torch.float16)
            assert name == ("ascend" if has_it else "reference"), chip
            assert has_it or f"no product with grouped 4-bit weights on {chip}" in reason
        name, reason = preferred_kernel("npu", "float32")
        assert name == "reference" and "not in float32" in reason
        assert preferred_kernel("npu", "float16", "reference") == ("reference", "asked for")


@simulated
def test_a_torch_npu_without_the_operator() -> None:
    prepare_device()
    name, reason = choice()
    assert (name, reason.split(";")[0]) == ("reference", f"this torch_npu has no {operator.NAME}")


def raising(*args: Any, **kwargs: Any) -> Tensor:
    raise RuntimeError("call aclnnWeightQuantBatchMatmulV2 failed, error code is 561002\n[Error]")


def of_unsigned(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As if the operator took nibbles for 0..15."""
    return operator.emulated(x, weight ^ -2004318072, *args, **kwargs)


def in_the_order_of_the_file(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out = operator.emulated(x, weight, *args, **kwargs)
    return out.unflatten(1, (-1, 4, 2)).transpose(2, 3).flatten(1)


@pytest.mark.parametrize(
    ("computes", "said"),
    [
        (raising, "fails: call aclnnWeightQuantBatchMatmulV2 failed, error code is 561002"),
        (of_unsigned, "does not compute what is documented"),
        (in_the_order_of_the_file, "does not compute what is documented"),
    ],
)
def test_an_operator_that_fails_is_not_used(computes: Callable[..., Tensor], said: str) -> None:
    @simulated
    def inside() -> None:
        prepare_device()
        operator.emulated, kept = computes, operator.emulated
        with operator.defined():
            operator.emulated = kept
            name, reason = choice()
            assert name == "reference" and f"{operator.NAME} {said};" in reason
            layer = packed("npu", torch.bfloat16)
            layer.after_load()
            assert "qweight" in layer._buffers and said in layer.kernel.reason
            x = torch.randn(4, 256).bfloat16()
            assert error(layer(x.to("npu")), packed("cpu", torch.bfloat16)(x)) < 1e-6

    inside()


@simulated
def test_a_shape_that_the_operator_refuses_is_told_and_computed_otherwise() -> None:
    prepare_device()
    check = operator._check

    def but_for_192(x: Tensor, weight: Tensor, *rest: Any) -> None:
        check(x, weight, *rest)
        if weight.shape[1] * 8 == 192:
            raise RuntimeError("tiling of K=256, N=192 fails")

    operator._check = but_for_192
    with operator.defined():
        assert preferred_kernel("npu", "bfloat16").name == "ascend"
        layer = packed("npu", torch.bfloat16)
        with pytest.warns(UserWarning, match="linears of 256 x 192 are de-quantized: npu_weight"):
            layer.after_load()
        with warnings.catch_warnings():  # once is enough
            warnings.simplefilter("error")
            again = packed("npu", torch.bfloat16)
            again.after_load()
            other = packed("npu", torch.bfloat16, (256, 64, 64))
            other.after_load()
        assert (again.kernel.name, other.kernel.name) == ("reference", "ascend")
        assert sim.live_bytes() < 1 << 20
        x = torch.randn(4, 256).bfloat16()
        assert error(layer(x.to("npu")), packed("cpu", torch.bfloat16)(x)) < 1e-6
        # Plans from here on say so.
        name, reason = preferred_kernel("npu", "bfloat16")
        assert name == "ascend"
        assert "256 x 192 are de-quantized: npu_weight_quant_batchmatmul fails: tiling" in reason


@simulated
def test_limits_are_refused_by_name() -> None:
    prepare_device()
    with operator.defined():
        for shape, said in (
            ((65_536, 64, 128), "65536 inputs are more than 65535"),
            ((96, 64, 48), "groups of 48 inputs are no multiple of 32"),
        ):
            kernel = select(Problem("npu", torch.float16, *shape))
            assert kernel.name == "reference" and said in kernel.reason


@simulated
def test_a_device_that_is_full_is_no_failure_of_the_operator() -> None:
    prepare_device()
    with operator.defined():
        problem = Problem("npu", torch.bfloat16, *SHAPE)
        sim.fail_allocation(1)  # of the trial that comes before a plan, which then goes by the name
        assert preferred_kernel("npu", "bfloat16").name == "ascend"
        assert sim.refusals() == 1
        assert preferred_kernel("npu", "bfloat16").name == "ascend"
        sim.fail_allocation(2)
        with pytest.raises(torch.OutOfMemoryError):
            select(problem)
        assert select(problem).name == "ascend" and chips.refused_shapes == {}
        check, full = operator._check, "NPU out of memory. NPUWorkspaceAllocator tried to allocate"

        def crowded(*args: Any) -> None:
            raise RuntimeError(f"{full} 2.00 MiB")

        operator._check = crowded  # what has no class of its own says so in words
        other = Problem("npu", torch.bfloat16, 128, 192, 64)
        assert preferred_kernel("npu", "bfloat16").name == "ascend"
        with pytest.raises(RuntimeError, match=full):
            select(other)
        operator._check = check
        assert select(other).name == "ascend" and chips.refused_shapes == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 300])
def test_a_linear_that_streams_computes_what_one_that_stays_does(
    dtype: torch.dtype, rows: int
) -> None:
    """It has no `after_load`: the operator computes from the file's words, within the scratch that
    is planned for de-quantizing them."""

    @simulated
    def inside() -> None:
        prepare_device()
        x = torch.randn(rows, 256).to(dtype).to("npu")
        with operator.defined():
            stays = packed("npu", dtype)
            stays.after_load()
            wanted = stays(x)
            layer = packed("npu", dtype)
            words = layer.qweight.cpu()
            layer(x[:1])  # tries the operator
            layer.scratch.free()
            held = sim.live_bytes()
            torch.npu.reset_peak_memory_stats()
            found = layer(x)
            peak = torch.npu.max_memory_allocated() - held - found.nbytes
            assert layer.kernel.name == "ascend" and torch.equal(layer.qweight.cpu(), words)
            assert torch.equal(found.cpu(), wanted.cpu())
        # Rounding up to 512 bytes counts, of so small tensors.
        assert 0 < peak <= scratch_bytes(256, 192, "reference", 64) + 16 * 512
        assert sim.host_operators() == {} and sim.races() == []

    inside()


@simulated
def test_a_linear_that_streams_needs_no_operator() -> None:
    """Without one it is de-quantized, without shifts and within its scratch."""
    prepare_device()
    meter = Meter(open_device("npu"))
    layer = packed("npu", torch.float16)
    x = torch.randn(4, 256).half()
    with meter.phase("work"), torch.inference_mode():
        found = layer(x.to("npu"))
    assert layer.kernel.name == "reference"
    assert error(found, packed("cpu", torch.float16)(x)) < 1e-6
    assert 0 < layer.scratch.nbytes <= scratch_bytes(256, 192, "reference", 64)
    assert sim.host_operators() == {}


def test_nothing_is_asked_of_a_torch_npu_that_was_not_opened() -> None:
    assert "torch_npu" not in sys.modules
    name, reason = preferred_kernel("npu", "float16")
    assert name == "ascend" and "of layers that stream too" in reason
    assert "torch_npu" not in sys.modules
    kernel = select(Problem("npu", torch.float16, *SHAPE))
    assert kernel.name == "reference" and "no NPU is open" in kernel.reason
