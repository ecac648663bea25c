"""The simulated accelerator itself: its limit, its books, its clock, and the races it finds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import simdevice as sim
import torch
import torch.nn.functional as F
from simdevice import simulated

from lowvram.errors import DeviceError
from lowvram.offload import open_device
from lowvram.offload.accelerator import FALLBACK_CONTEXT_BYTES

MIB = 1 << 20
NPU = "npu:0"


def block(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=NPU)


def pinned(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)


@simulated
def test_the_limit_is_hard_and_its_error_is_the_real_one() -> None:
    sim.configure(limit=8 * MIB, context=MIB)
    held = [block(3 * MIB), block(4 * MIB)]
    with pytest.raises(torch.OutOfMemoryError) as refused:
        block(1)
    assert str(refused.value).startswith(
        "NPU out of memory. Tried to allocate 0.00 MiB (NPU 0; 8.00 MiB total capacity; "
        "7.00 MiB already allocated; 0.00 MiB free; 7.00 MiB reserved in total by PyTorch)"
    )
    held.pop()
    assert block(4 * MIB).nbytes == 4 * MIB
    assert torch.npu.memory_stats()["num_ooms"] == 1


@simulated
def test_the_allocators_share_and_other_processes_are_limits_too() -> None:
    sim.configure(limit=8 * MIB)
    torch.npu.set_per_process_memory_fraction(0.25)
    held = block(2 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        block(512)
    torch.npu.set_per_process_memory_fraction(1.0)
    sim.configure(others=5 * MIB)
    assert torch.npu.mem_get_info() == (MIB, 8 * MIB)
    assert block(MIB).nbytes
    with pytest.raises(torch.OutOfMemoryError):
        block(MIB + 512)
    assert held.nbytes == 2 * MIB


@simulated
def test_the_books_are_the_sum_of_live_storages() -> None:
    generator = torch.Generator().manual_seed(0)
    live: list[torch.Tensor] = []
    seen_peak = 0
    for step in range(300):
        size = int(torch.randint(1, 5000, (), generator=generator))
        made = torch.zeros(size, dtype=torch.uint8, device=NPU)
        live += [made, made[size // 2 :], made.view(-1, 1)]  # two views of it, which count nothing
        if step % 3:
            live[int(torch.randint(0, len(live) - 3, (), generator=generator))] = made
        live = live[-60:]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in live}
        expected = sum(-(-nbytes // 512) * 512 for nbytes in storages.values())
        assert torch.npu.memory_allocated() == sim.live_bytes() == expected
        assert torch.accelerator.memory_allocated() == expected
        seen_peak = max(seen_peak, expected)
    assert torch.npu.max_memory_allocated() >= seen_peak > 0
    live.clear()
    del made
    assert sim.live_bytes() == 0
    assert sim.live_storages() == 0


@simulated
def test_freed_memory_is_kept_until_the_cache_is_emptied() -> None:
    first = block(4 * MIB)
    del first
    second = block(MIB)
    assert torch.npu.memory_reserved() == torch.npu.max_memory_reserved() == 4 * MIB
    torch.npu.reset_peak_memory_stats()
    assert torch.npu.max_memory_allocated() == MIB
    assert torch.npu.max_memory_reserved() == 4 * MIB
    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    assert torch.npu.max_memory_reserved() == torch.npu.memory_reserved() == second.nbytes


@simulated
def test_memory_that_nothing_was_written_to_holds_no_numbers() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.empty(100, dtype=dtype, device=NPU).isnan().all()


OPERATORS: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x @ x.transpose(-1, -2),
    lambda x: F.conv1d(x, x[:2, :, :3], padding=1),
    lambda x: F.conv_transpose1d(x, x.transpose(0, 1)[:, :2, :3], stride=2),
    lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    lambda x: F.layer_norm(x, x.shape[-1:]),
    lambda x: F.rms_norm(x, x.shape[-1:]),
    lambda x: torch.cat([x, x.flip(0)], 1).softmax(-1),
    lambda x: x.index_select(1, torch.tensor([2, 0], device=x.device)),
    lambda x: x[torch.tensor([1, 0], device=x.device), :, 1],
    lambda x: x.topk(2).indices,
    lambda x: torch.mm(x[0], x[0].T, out=torch.empty(5, 5, device=x.device)),
    lambda x: torch.add(x, 1, out=torch.empty(0, device=x.device)),
    lambda x: x.clone().mul_(x).masked_fill_(x > 0, -1.0),
    lambda x: x.to(torch.bfloat16).transpose(0, 2).contiguous(),
    lambda x: x.split([2, 3], 1)[1].unfold(2, 3, 2).sum(-1),
    lambda x: x.new_zeros(3, 5, 7).copy_(x[0]),
    lambda x: torch.arange(6, device=x.device).view(2, 3).roll(1, 1),
    lambda x: x.sum().item(),
]


@simulated
def test_results_are_those_of_the_cpu_bit_for_bit() -> None:
    host = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for operator in OPERATORS:
            wanted, got = operator(host), operator(host.to(NPU))
            if isinstance(got, torch.Tensor):
                assert got.device.type == "npu"
                assert got.stride() == wanted.stride()
                got = got.cpu()
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert not sim.races()


@simulated
def test_views_write_through_and_the_two_devices_do_not_mix() -> None:
    x = torch.zeros(4, 6, device=NPU)
    x.t()[2:4].fill_(1)
    x.view(torch.int32)[0, 0] = 0
    assert x.sum().item() == 8
    with pytest.raises(RuntimeError, match="on the same device"):
        x + torch.ones(6)
    assert (x + torch.tensor(1.0)).device.type == "npu"


@simulated
def test_what_ascend_has_not_is_refused() -> None:
    x = torch.zeros(2, 4, device=NPU)
    with pytest.raises(RuntimeError, match="type Double are not supported"):
        torch.zeros(2, dtype=torch.float64, device=NPU)
    with pytest.raises(RuntimeError, match="type Double are not supported"):
        x.double()
    with pytest.raises(RuntimeError, match="ComplexFloat are not supported"):
        torch.zeros(2, dtype=torch.complex64, device=NPU)
    with pytest.raises(RuntimeError, match="masked_scatter_ is not supported"):
        x.masked_scatter(x == 0, x)
    with pytest.raises(RuntimeError, match="has no bfloat16; pad in float32"):
        F.pad(x.bfloat16(), (1, 1), mode="replicate")
    with pytest.raises(RuntimeError, match="does not mix"):
        F.layer_norm(x.bfloat16(), (4,), x[0])
    with pytest.raises(RuntimeError, match="Conv3d in BFloat16 does not compile"):
        volume = torch.zeros(1, 1, 2, 2, 2, dtype=torch.bfloat16, device=NPU)
        F.conv3d(volume, volume)
    with pytest.raises(RuntimeError, match="missing kernel for npu"):
        torch.kaiser_window(12, device=NPU)
    q = torch.zeros(1, 1, 2, 8, device=NPU)
    for mask in (torch.zeros(2, 2, device=NPU), torch.ones(2, 2, dtype=torch.bool, device=NPU)):
        with pytest.raises(RuntimeError, match="takes neither mask"):
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    with pytest.raises(RuntimeError, match="bitwise_right_shift is not supported"):
        torch.bitwise_right_shift(torch.zeros(4, dtype=torch.int32, device=NPU), 1)
    with pytest.raises(RuntimeError, match="shift__ is not supported"):
        torch.zeros(4, dtype=torch.int32, device=NPU) >> 4
    assert not sim.host_operators()
    torch.isin(torch.zeros(4, device=NPU), torch.zeros(1, device=NPU))
    assert sim.host_operators() == {"aten::isin": 1}


@simulated
def test_depthwise_transposed_convolutions_are_as_long_as_is_allowed() -> None:
    x, weight = torch.zeros(1, 2, 40, device=NPU), torch.zeros(2, 1, 12, device=NPU)
    F.conv_transpose1d(x, weight, stride=2, groups=2)
    sim.configure(transposed=32)
    with pytest.raises(RuntimeError, match="of 40 samples takes a long time; do at most 32"):
        F.conv_transpose1d(x, weight, stride=2, groups=2)
    F.conv_transpose1d(x[..., :32], weight, stride=2, groups=2)
    F.conv_transpose1d(x, torch.zeros(2, 1, 12, device=NPU), stride=2)


@simulated
def test_copies_hide_behind_compute_for_exactly_as_long_as_it_lasts() -> None:
    """Eight blocks of 1 MB over 1 GB/s, each used by a kernel that reads and writes 1 MB each."""
    sim.configure(h2d=1e9, hbm=1e9, launch=0)
    size, blocks = 1_000_000, 8
    sources = [pinned(size) for _ in range(blocks)]
    slabs = [block(size) for _ in range(2)]
    main, side = torch.npu.current_stream(), torch.npu.Stream()
    ready, free = [[torch.npu.Event() for _ in range(2)] for _ in range(2)]
    sim.reset()
    for event in free:
        event.record(main)
    for i, source in enumerate(sources):
        k = i % 2
        with torch.npu.stream(side):
            side.wait_event(free[k])
            slabs[k].copy_(source, non_blocking=True)
            ready[k].record(side)
        main.wait_event(ready[k])
        slabs[k].add_(1)
        free[k].record(main)
    copy, use = 1e-3, 2e-3
    assert sim.host_now() == 0
    assert sim.now() == pytest.approx(copy + blocks * use, abs=1e-12)
    assert sim.busy("h2d") == pytest.approx(blocks * copy, abs=1e-12)
    assert sim.busy("compute") == pytest.approx(blocks * use, abs=1e-12)
    torch.npu.synchronize()
    assert sim.host_now() == sim.now()
    assert not sim.races()


@simulated
def test_pageable_copies_are_slow_and_hold_the_host() -> None:
    sim.configure(h2d=1e9, d2h=2e9, pageable=0.5, launch=1e-6)
    device, host, fast = block(MIB), torch.zeros(MIB, dtype=torch.uint8), pinned(MIB)
    sim.reset()
    device.copy_(fast, non_blocking=True)
    assert sim.host_now() == pytest.approx(1e-6)
    sim.reset()
    device.copy_(fast)
    assert sim.host_now() == pytest.approx(MIB / 1e9, rel=1e-3)
    sim.reset()
    device.copy_(host, non_blocking=True)
    assert sim.host_now() == pytest.approx(MIB / 0.5e9, rel=1e-3)
    sim.reset()
    host.copy_(device, non_blocking=True)
    assert sim.host_now() == pytest.approx(MIB / 1e9, rel=1e-3)
    assert fast.is_pinned() and not host.is_pinned()


@simulated
def test_products_take_their_flops_and_events_measure_them() -> None:
    sim.configure(flops=1e9, hbm=1e15, launch=0)
    x = torch.zeros(100, 200, device=NPU)
    begin, end = torch.npu.Event(), torch.npu.Event()
    sim.reset()
    begin.record()
    x @ x.T
    end.record()
    assert sim.now() == pytest.approx(2 * 100 * 200 * 100 / 1e9)
    assert not end.query()
    end.synchronize()
    assert end.query() and sim.host_now() == sim.now()
    assert begin.elapsed_time(end) == pytest.approx(1e3 * sim.now())


@simulated
def test_the_planned_allocation_fails_once() -> None:
    sim.fail_allocation(3)
    held = [block(512), block(512)]
    with pytest.raises(torch.OutOfMemoryError):
        block(512)
    held.append(block(512))
    assert sim.allocations() == len(held) == 3
    sim.fail_allocation(1, pinned=True)
    with pytest.raises(RuntimeError, match=r"pinning .* failed"):
        pinned(512)
    assert pinned(512).is_pinned() and sim.pinned_bytes() > 0


@simulated
def test_our_device_reads_its_sizes_from_it() -> None:
    sim.configure(limit=2 << 30, context=FALLBACK_CONTEXT_BYTES, others=256 * MIB)
    device = open_device("npu")
    assert torch.npu.jit_compile is torch.npu.config.allow_internal_format is False
    assert (device.name, device.type, device.total_bytes()) == (NPU, "npu", 2 << 30)
    assert device.free_bytes() == (2 << 30) - 256 * MIB
    assert device.has_bfloat16()
    device.empty_cache()
    device.reset_peak()
    before = device.peak_bytes()
    assert before == FALLBACK_CONTEXT_BYTES
    held = block(10 * MIB)
    assert device.peak_bytes() == before + 10 * MIB
    device.set_limit(device.context_bytes() + 10 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        block(512)
    device.set_limit(None)
    assert block(512).nbytes and held.nbytes == device.allocated_bytes() - 512
    with pytest.raises(DeviceError, match="counted from 0"):
        open_device("npu:1")


def test_the_other_tests_do_not_see_it() -> None:
    @simulated
    def inside() -> None:
        assert torch.accelerator.current_accelerator() == torch.device("npu")
        assert "torch_npu" in sys.modules

    inside()
    assert not hasattr(torch, "npu")
    assert "torch_npu" not in sys.modules


def test_a_failure_inside_is_a_failure_outside() -> None:
    @simulated
    def inside() -> None:
        assert sim.live_bytes() == 1, "a word of its own"

    with pytest.raises(AssertionError, match="a word of its own"):
        inside()
