"""Devices: names, and the arithmetic of accelerators on a back end that is made up."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from lowvram.errors import DeviceError, UsageError
from lowvram.offload import accelerator, open_device
from lowvram.offload import probe as probe_module

MIB, GIB = 1 << 20, 1 << 30


class Backend:
    """A `torch.cuda` of 8 GiB: others use 1 GiB, the context 300 MiB, torch 20 MiB at once."""

    def __init__(self, *, initialized: bool = False, bfloat16: bool = True) -> None:
        self.initialized, self.bfloat16 = initialized, bfloat16
        self.others, self.context, self.reserved, self.peak = GIB, 0, 0, 0
        self.share: float | None = None
        self.calls: list[str] = []

    def start(self) -> None:
        self.context, self.reserved, self.peak = 300 * MIB, 20 * MIB, 20 * MIB
        self.initialized = True

    def is_initialized(self) -> bool:
        return self.initialized

    def set_device(self, index: int) -> None:
        self.calls.append(f"set_device {index}")

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return self.bfloat16 or including_emulation

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 8 * GIB - self.others - self.context - self.reserved, 8 * GIB

    def memory_reserved(self, index: int) -> int:
        return self.reserved

    def memory_allocated(self, index: int) -> int:
        return self.reserved // 2

    def max_memory_reserved(self, index: int) -> int:
        return self.peak

    def reset_peak_memory_stats(self, index: int) -> None:
        self.peak = self.reserved

    def synchronize(self, index: int) -> None:
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    def set_per_process_memory_fraction(self, share: float, index: int) -> None:
        self.share = share


def accelerator_on(backend: Backend, **changes: Any) -> accelerator.AcceleratorDevice:
    spec = replace(
        accelerator.ACCELERATORS["cuda"],
        driver_free=lambda b, index: b.mem_get_info(index)[0],
        warm_up=lambda device, dtype: backend.start(),
    )
    return accelerator.AcceleratorDevice(replace(spec, **changes), 0, backend)


def test_the_context_is_what_the_driver_lost_beyond_the_allocator_s_memory() -> None:
    device = accelerator_on(Backend())
    assert (device.name, device.type, device.torch) == ("cuda:0", "cuda", torch.device("cuda", 0))
    assert device.context_bytes() == 300 * MIB


def test_a_context_that_cannot_be_measured_is_taken_at_its_published_size() -> None:
    assert accelerator.FALLBACK_CONTEXT_BYTES == 640 * MIB
    before = accelerator_on(Backend(initialized=True))
    no_tool = accelerator_on(Backend(), driver_free=lambda backend, index: None)
    noisy = Backend()
    answers = iter([7 * GIB, 2 * GIB])  # another process took 5 GiB in between
    disturbed = accelerator_on(noisy, driver_free=lambda backend, index: next(answers))
    for device in (before, no_tool, disturbed):
        assert device.context_bytes() == 640 * MIB


def test_free_is_what_others_leave_and_peak_is_what_the_driver_sees() -> None:
    backend = Backend()
    device = accelerator_on(backend)
    assert device.total_bytes() == 8 * GIB
    assert device.free_bytes() == 7 * GIB
    backend.reserved = backend.peak = 2 * GIB
    assert device.free_bytes() == 7 * GIB
    assert device.allocated_bytes() == GIB
    backend.reserved = GIB
    assert device.peak_bytes() == 2 * GIB + 300 * MIB
    device.reset_peak()
    assert device.peak_bytes() == GIB + 300 * MIB
    backend.others = 0
    backend.context = 0  # a context taken for larger than it is must not free more than exists
    assert device.free_bytes() == 8 * GIB


def test_the_limit_is_the_allocator_s_share_of_what_the_driver_sees() -> None:
    backend = Backend()
    device = accelerator_on(backend)
    device.set_limit(2 * GIB + 300 * MIB)
    assert backend.share == 0.25
    device.set_limit(100 * GIB)
    assert backend.share == 1.0
    device.set_limit(100 * MIB)  # the context alone is more
    assert backend.share == 0.0
    device.set_limit(None)
    assert backend.share == 1.0


def test_devices_say_whether_they_compute_in_bfloat16() -> None:
    assert accelerator_on(Backend()).has_bfloat16()
    assert not accelerator_on(Backend(bfloat16=False)).has_bfloat16()
    assert open_device("cpu").has_bfloat16() and open_device("meta").has_bfloat16()


def test_cpu_reports_the_process() -> None:
    cpu = open_device("cpu")
    assert (cpu.name, cpu.type, cpu.torch) == ("cpu", "cpu", torch.device("cpu"))
    cpu.reset_peak()
    block = torch.ones(32 * MIB, dtype=torch.uint8)
    assert cpu.peak_bytes() >= cpu.allocated_bytes() >= block.nbytes
    assert 0 < cpu.free_bytes() <= cpu.total_bytes()
    assert cpu.context_bytes() == 0
    assert cpu.copy_lane() is None


def test_auto_is_the_first_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(probe_module, "npu_installed", lambda: False)
    assert open_device("auto").name == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match="cuda"):
        open_device("auto")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "tpu:0"])
def test_an_unknown_name_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="unknown device"):
        open_device(name)


def test_cuda_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match="build without CUDA; install one with CUDA"):
        open_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(DeviceError, match="torch sees none; check the driver"):
        open_device("cuda:1")


def test_an_index_beyond_the_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=r"cuda:2 was asked for.*has 2 cuda device"):
        open_device("cuda:2")


def test_npu_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "npu_installed", lambda: False)
    with pytest.raises(DeviceError, match=r"torch_npu is not installed; .*lowvram-omni\[npu\]"):
        open_device("npu")


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libhccl.so: cannot open shared object file: No such file or directory"),
        OSError("libascendcl.so\nand a second line"),
        RuntimeError(""),
    ],
)
def test_npu_that_does_not_load_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked: list[str] = []

    def fail(name: str) -> None:
        asked.append(name)
        raise error

    monkeypatch.setattr(probe_module, "npu_installed", lambda: True)
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(DeviceError, match=r"torch_npu does not load \(.+\); install the CANN") as e:
        open_device("npu:0")
    assert asked == ["torch_npu"]
    assert "\n" not in str(e.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_device("auto").name == "cpu"
