"""Requests on the simulated device, with packed weights on Ascend's 4-bit product, emulated."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simdevice as sim
import torch
from safetensors.torch import load_file, save_file
from simdevice import operator, simulated

from lowvram import LowVRAMOmni, Result
from lowvram.models import attention as attention_module
from lowvram.models.bigvgan import LONGEST_TRANSPOSED
from lowvram.offload import Placement
from lowvram.offload.accelerator import FALLBACK_CONTEXT_BYTES
from lowvram.planner import Plan
from lowvram.pocket import make_checkpoint

GIB = 1 << 30
RNG = np.random.default_rng(0)
EVERYTHING = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": RNG.integers(0, 255, (56, 56, 3), dtype=np.uint8)},
            {"type": "audio", "audio": np.sin(np.arange(16_000) / 9).astype(np.float32)},
            {"type": "video", "video": RNG.integers(0, 255, (2, 56, 56, 3), dtype=np.uint8)},
            {"type": "text", "text": "What is all this?"},
        ],
    }
]
SHORT: dict[str, Any] = {"max_new_tokens": 3, "max_speech_seconds": 0.4}
TYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scales are such as bfloat16 holds too: rounding them is not what is looked at here."""
    path = make_checkpoint(tmp_path_factory.mktemp("models") / "awq", seed=5, awq=True)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(".scales"):
            tensors[name] = tensor.bfloat16().half()
    save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def wanted(folder: Path) -> dict[str, Result]:
    """Replies of the CPU's reference, its attention in blocks as on an NPU."""

    def blockwise(q: Any, k: Any, v: Any, scale: float) -> torch.Tensor:
        return attention_module.blockwise(q, k, v, causal=True, scale=scale)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for dtype in ("float16", "bfloat16"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_module, "_causal_cpu", blockwise)
            with opened(folder, dtype, device="cpu", kernel="reference") as omni:
                found[dtype] = omni.generate(EVERYTHING, **SHORT)
    torch.set_num_threads(threads)
    return found


def opened(folder: Path, dtype: str, device: str = "npu", **options: Any) -> LowVRAMOmni:
    return LowVRAMOmni.from_pretrained(folder, device=device, dtype=dtype, **options)


def prepare_device(limit: int = 8 * GIB) -> None:
    sim.reset()
    sim.configure(limit=limit, context=FALLBACK_CONTEXT_BYTES, transposed=LONGEST_TRANSPOSED)


def check(found: Result, wanted: Result) -> None:
    assert (found.tokens, found.codes) == (wanted.tokens, wanted.codes)
    assert np.array_equal(found.audio, wanted.audio)  # type: ignore[arg-type]


@TYPES
def test_every_budget_gives_the_reply_of_the_cpus_reference(
    dtype: str, folder: Path, wanted: dict[str, Result]
) -> None:
    """Whether all layers stay, none, or some."""

    @simulated
    def inside() -> None:
        with operator.defined():
            prepare_device()
            with opened(folder, dtype) as omni:
                plan = omni.plan(EVERYTHING, **SHORT)
            assert any(line.startswith("packed linears, ascend: ") for line in plan.reasons)
            least, most = plan.minimum_budget_bytes, plan.predicted_peak_bytes + 100 * 2**20
            for budget in (least, (least + most) // 2, most):
                prepare_device(limit=budget)
                operator.calls.clear()
                with opened(folder, dtype, max_memory=budget) as omni:
                    result = omni.generate(EVERYTHING, **SHORT)
                check(result, wanted[dtype])
                assert operator.calls
                assert torch.npu.max_memory_reserved() + FALLBACK_CONTEXT_BYTES <= budget
                assert torch.npu.memory_stats()["num_ooms"] == 0
                for row in result.report.phases:
                    assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes
                assert sim.races() == [] and sim.host_operators() == {}
                assert sim.live_bytes() == sim.pinned_bytes() == 0

    inside()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("has_it", [True, False])
def test_layers_that_stream_give_the_same_reply(
    every: int, has_it: bool, folder: Path, wanted: dict[str, Result]
) -> None:
    """All of them or every second one, by the operator or, where there is none, de-quantized."""

    @simulated
    def inside() -> None:
        prepare_device()
        with operator.defined() if has_it else nullcontext(), opened(folder, "float16") as omni:
            make = omni._plan

            def with_streams(*of: Any) -> Plan:
                sizes = omni._loader.unit_bytes("text")
                units = tuple(range(0, len(sizes), every))
                slab = max(sizes[i] for i in units)
                streams = Placement(streamed=units, slabs=2, slab_bytes=slab, source="pinned")
                return replace(make(*of), placements={"text": streams})

            omni._plan = with_streams  # type: ignore[method-assign]
            operator.calls.clear()
            check(omni.generate(EVERYTHING, **SHORT), wanted["float16"])
            streamed = omni._loader.bytes_streamed
            assert streamed and bool(operator.calls) == has_it
        assert sim.races() == [] and sim.host_operators() == {}

    inside()


@simulated
def test_a_chip_without_the_product_dequantizes_and_the_plan_says_why(
    folder: Path, wanted: dict[str, Result]
) -> None:
    prepare_device()
    torch.npu.get_device_name = lambda index=None: "Ascend310P3"
    with operator.defined(), opened(folder, "float16") as omni:
        (line,) = (one for one in omni.plan(EVERYTHING, **SHORT).reasons if "packed" in one)
        assert line.startswith("packed linears, reference: CANN has no product with grouped")
        assert "on Ascend310P3; weights are de-quantized for every product" in line
        operator.calls.clear()
        check(omni.generate(EVERYTHING, **SHORT), wanted["float16"])
        assert operator.calls == []


@simulated
def test_a_shape_that_is_refused_while_loading_changes_nothing_but_the_next_plan(
    folder: Path, wanted: dict[str, Result]
) -> None:
    prepare_device()
    with opened(folder, "float16") as omni:
        least = omni.plan(EVERYTHING, **SHORT).minimum_budget_bytes
    emulated = operator._check

    def but_for_one(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> None:
        emulated(x, weight, *rest)
        if tuple(weight.shape) == (512, 32):
            raise RuntimeError("the tiling of this shape fails")

    operator._check = but_for_one
    with operator.defined(), opened(folder, "float16", max_memory=4 * least) as omni:
        with pytest.warns(UserWarning, match="linears of 512 x 256 are de-quantized"):
            result = omni.generate(EVERYTHING, **SHORT)
        check(result, wanted["float16"])
        assert (512, 256) not in {call[1:] for call in operator.calls}
        for row in result.report.phases:
            assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes
        reasons = omni.plan(EVERYTHING, **SHORT).reasons
    assert any("linears of 512 x 256 are de-quantized: npu_weight" in line for line in reasons)
