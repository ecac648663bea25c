"""Streaming to a device with memory of its own: order, speed, memory, and what can fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import simdevice as sim
import torch
from safetensors.torch import save_file
from simdevice import simulated
from streamed_part import LAYERS, WIDTH, loader_of, one_pass, streaming, unit_bytes, write_stack
from torch import Tensor, nn

from lowvram.errors import DeviceError
from lowvram.offload import Device, Loader, Meter, Part, Placement, Store, open_device, supply
from lowvram.offload.carriers import PinnedCarrier
from lowvram.offload.lane import StreamLane
from lowvram.offload.pinned import pinned_bytes

SETS = [(0, 1, 2), (1, 3, 4, 6), (0, 2, 5, 6, 7), tuple(range(LAYERS + 3))]


@contextmanager
def stack_on_npu(folder: Path) -> Iterator[tuple[Loader, Meter, Device, Tensor, Tensor]]:
    """A loader, meter and device, an input there, and the result the CPU has for it."""
    write_stack(folder, LAYERS)
    with Store.open(folder) as store:
        x = torch.randn(2, WIDTH)
        on_cpu, _ = loader_of(store, open_device("cpu"), LAYERS)
        wanted = one_pass(on_cpu.load("stack"), on_cpu.stream("stack"), x)
        device = open_device("npu")
        loader, meter = loader_of(store, device, LAYERS)
        try:
            yield loader, meter, device, x.to(device.torch), wanted
        finally:
            loader.close()


@pytest.mark.parametrize("source", ["pinned", "ring"])
@pytest.mark.parametrize("inference", [False, True])
@simulated
def test_a_streamed_pass_is_the_resident_one_without_races(
    tmp_path: Path, source: Any, inference: bool
) -> None:
    with (
        stack_on_npu(tmp_path) as (loader, meter, _, x, wanted),
        torch.inference_mode(inference),
    ):
        before = sim.live_bytes()
        module = loader.load("stack")
        assert torch.equal(one_pass(module, loader.stream("stack"), x).cpu(), wanted)
        for streamed in SETS:
            for slabs in (1, 2, 3):
                placement = streaming(LAYERS, *streamed, slabs=slabs, source=source)
                module = loader.load("stack", placement)
                for _ in range(3):
                    found = one_pass(module, loader.stream("stack"), x).cpu()
                    assert torch.equal(found, wanted)
                del found
                assert meter.held()["slabs"] == slabs * placement.slab_bytes
                assert sim.live_bytes() - before == sum(meter.held().values())
        loader.close()
        assert (sim.live_bytes(), meter.held(), loader.notes) == (before, {}, [])
        assert sim.pinned_bytes() == 0
        assert sim.races() == []


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256, bias=False)
        self.down = nn.Linear(256, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))


BLOCKS, BLOCK_BYTES, LINK = 12, 2 * 64 * 256 * 4, 25e9
EVERY_OTHER = tuple(range(0, BLOCKS, 2))


@contextmanager
def tower_on_npu(folder: Path) -> Iterator[tuple[Loader, Device]]:
    tensors = {f"blocks.{i}.up.weight": torch.randn(256, 64) / 8 for i in range(BLOCKS)}
    tensors |= {f"blocks.{i}.down.weight": torch.randn(64, 256) / 8 for i in range(BLOCKS)}
    save_file(tensors, folder / "model.safetensors")
    device = open_device("npu")
    part = Part("tower", "", Tower, torch.float32, lambda tower: list(tower.blocks))
    with Store.open(folder) as store:
        loader = Loader(store, device, Meter(device), [part])
        try:
            yield loader, device
        finally:
            loader.close()


def placed(*streamed: int, slabs: int = 2) -> Placement:
    return Placement(streamed=streamed, slabs=slabs, slab_bytes=BLOCK_BYTES, source="pinned")


def decode(loader: Loader, device: Device, placement: Placement | None) -> tuple[float, float]:
    """(virtual seconds a pass takes, the bound), with a look at every pass's result, as sampling
    has, and no allocation that the resident part would not make."""
    tower = loader.load("tower", placement)
    assert isinstance(tower, Tower)
    stream = loader.stream("tower")
    x = torch.randn(1, 64, device=device.torch)

    def one() -> None:
        y = x
        for index in range(BLOCKS):
            with stream.unit(index) as block:
                y = block(y)
        assert y.isfinite().all()

    one()
    device.synchronize()
    begun, computed, made = sim.now(), sim.busy("compute"), sim.allocations()
    passes = 8
    for _ in range(passes):
        one()
    made_in_a_pass = (sim.allocations() - made) / passes
    assert made_in_a_pass <= 4 * BLOCKS + 8
    took = (sim.now() - begun) / passes
    moved = len(placement.streamed) * BLOCK_BYTES if placement else 0
    return took, max((sim.busy("compute") - computed) / passes, moved / LINK)


@pytest.mark.parametrize("hbm", [900e9, 50e9, 25e9, 12.5e9])
@simulated
def test_decoding_is_as_fast_as_the_link_or_the_memory(tmp_path: Path, hbm: float) -> None:
    sim.configure(h2d=LINK, d2h=LINK, hbm=hbm, flops=1e15, launch=2e-9)
    every_third = tuple(range(0, BLOCKS, 3))
    odd = (0, 2, 4, 7, 9)  # units change slabs from pass to pass
    with tower_on_npu(tmp_path) as (loader, device):
        for streamed in (tuple(range(BLOCKS)), EVERY_OTHER, every_third, odd):
            took, bound = decode(loader, device, placed(*streamed))
            assert bound * 0.9999 <= took <= bound / 0.97, streamed
        assert sim.races() == []


@simulated
def test_layers_that_stay_among_those_that_stream_beat_a_block_of_them(tmp_path: Path) -> None:
    sim.configure(h2d=LINK, hbm=50e9, flops=1e15, launch=2e-9)
    half = BLOCKS // 2
    with tower_on_npu(tmp_path) as (loader, device):
        spread, _ = decode(loader, device, placed(*EVERY_OTHER))
        first, _ = decode(loader, device, placed(*range(half)))
        last, _ = decode(loader, device, placed(*range(half, BLOCKS)))
        assert spread * 1.2 < min(first, last)


def no_wait(self: StreamLane, mark: Any) -> None:
    """What must not be left out."""


@pytest.mark.parametrize("left_out", ["wait", "after", "neither"])
@simulated
def test_without_its_waits_the_detector_fires(tmp_path: Path, left_out: str) -> None:
    sim.configure(h2d=LINK, hbm=25e9, flops=1e15, launch=2e-9)
    with tower_on_npu(tmp_path) as (loader, device), pytest.MonkeyPatch.context() as patch:
        loader.load("tower", placed(*range(BLOCKS)))
        if left_out != "neither":
            patch.setattr(StreamLane, left_out, no_wait)
        decode(loader, device, placed(*range(BLOCKS)))
        kinds = {race.split(":")[0] for race in sim.races()}
        if left_out == "wait":
            assert "read before written" in kinds
        elif left_out == "after":
            assert "overwritten while read" in kinds
        else:
            assert kinds == set()


@simulated
def test_one_thread_at_a_time_is_inside_the_copy_stream() -> None:
    lane = StreamLane(torch.device("npu", 0))
    entered = threading.Event()

    class Target:
        """Stands in for a tensor that takes its time."""

        def __init__(self, other: bool) -> None:
            self.other, self.alone = other, True

        def copy_(self, source: Any, non_blocking: bool) -> None:
            if self.other:
                entered.set()
            else:
                thread.start()
                self.alone = not entered.wait(0.1)

    second: Any = Target(True)
    first: Any = Target(False)
    thread = threading.Thread(target=lane.copy, args=(second, None))
    lane.copy(first, None)  # type: ignore[arg-type]
    thread.join()
    assert first.alone and entered.is_set()


@simulated
def test_a_part_dropped_in_the_middle_of_a_pass_races_with_nothing(tmp_path: Path) -> None:
    with stack_on_npu(tmp_path) as (loader, _, device, x, wanted):
        for source in ("pinned", "ring"):
            placement = streaming(LAYERS, *range(LAYERS), source=source)
            for stop in range(LAYERS):
                loader.load("stack", placement)
                for index in range(stop):
                    with loader.stream("stack").unit(index) as layer:
                        layer(x)
                loader.drop("stack")
                filled = torch.full((1 << 16,), 7, dtype=torch.uint8, device=device.torch)
                assert filled.eq(7).all()
            module = loader.load("stack", placement)
            assert torch.equal(one_pass(module, loader.stream("stack"), x).cpu(), wanted)
        assert sim.races() == []


@simulated
def test_a_pass_that_ended_early_can_begin_again(tmp_path: Path) -> None:
    with stack_on_npu(tmp_path) as (loader, _, _, x, wanted):
        for source in ("pinned", "ring"):
            module = loader.load("stack", streaming(LAYERS, 0, 1, 3, 5, 7, source=source))
            stream = loader.stream("stack")
            for stop in range(LAYERS + 3):
                for index in range(min(stop, LAYERS)):
                    with stream.unit(index) as layer:
                        layer(x)
                stream.restart()
                assert torch.equal(one_pass(module, stream, x).cpu(), wanted)
        assert sim.races() == []


@simulated
def test_an_interruption_between_units_leaves_no_slab_to_be_overwritten(tmp_path: Path) -> None:
    sim.configure(h2d=1e15, hbm=1e6, launch=0)  # copies take no time, compute a long one
    with tower_on_npu(tmp_path) as (loader, device), pytest.MonkeyPatch.context() as patch:
        loader.load("tower", placed(*range(BLOCKS)))
        stream = loader.stream("tower")
        x = torch.randn(1, 64, device=device.torch)

        def interrupted(self: PinnedCarrier, slab: int) -> None:
            patch.undo()
            raise KeyboardInterrupt

        with stream.unit(0) as block:
            x = block(x)
        patch.setattr(PinnedCarrier, "used", interrupted)
        with pytest.raises(KeyboardInterrupt), stream.unit(1) as block:
            x = block(x)
        stream.restart()
        for index in range(4):
            with stream.unit(index) as block:
                x = block(x)
        device.synchronize()
        assert sim.races() == []


@simulated
def test_masters_are_read_once_and_given_back_when_they_no_longer_serve(tmp_path: Path) -> None:
    with stack_on_npu(tmp_path) as (loader, _, _, x, wanted):
        placement = streaming(LAYERS, 0, 1, 2, 3, source="pinned")
        loader.load("stack")
        staging = sim.pinned_bytes()
        loader.load("stack", placement)
        masters = sim.pinned_bytes() - staging
        sizes = [unit_bytes(LAYERS, unit) for unit in placement.streamed]
        assert masters == pinned_bytes(sizes)
        loader.drop("stack")
        assert sim.pinned_bytes() - staging == masters
        store = loader._store
        assert store is not None
        read = store.bytes_read
        module = loader.load("stack", placement)
        assert store.bytes_read - read < unit_bytes(LAYERS, 4) + 1024  # what stays alone
        assert torch.equal(one_pass(module, loader.stream("stack"), x).cpu(), wanted)
        loader.load("stack", streaming(LAYERS, 0, 1, 2, 3, source="ring"))
        assert sim.pinned_bytes() - staging <= 4 * 4096
        loader.load("stack")
        assert sim.pinned_bytes() == staging


@pytest.mark.parametrize("why", ["short", "refused"])
@simulated
def test_a_host_without_room_for_masters_streams_from_the_file(tmp_path: Path, why: str) -> None:
    placement = streaming(LAYERS, 0, 1, 2, 3, source="pinned")
    with stack_on_npu(tmp_path) as (loader, _, _, x, wanted), pytest.MonkeyPatch.context() as patch:
        loader.load("stack")  # what is pinned for loading is there
        if why == "short":
            room = supply.HOST_RESERVE + 4096
            patch.setattr(supply, "host_memory", lambda: (1 << 40, room))
        for _ in range(2):
            if why == "refused":
                sim.fail_allocation(1, pinned=True)
            module = loader.load("stack", placement)
            for _ in range(2):
                found = one_pass(module, loader.stream("stack"), x)
                assert torch.equal(found.cpu(), wanted)
            loader.drop("stack")
        (note,) = loader.notes
        assert note.startswith("stack: its streamed units are read from the file again and again")
        assert ("than is free" if why == "short" else "pinning") in note
        assert sim.races() == []


@simulated
def test_a_host_without_room_for_a_ring_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with stack_on_npu(tmp_path) as (loader, meter, _, x, wanted):
        loader.load("stack")
        loader.drop("stack")
        before = sim.live_bytes(), sim.pinned_bytes()
        sim.fail_allocation(1, pinned=True)
        with pytest.raises(DeviceError, match=r"could be had to stream stack.*free host memory"):
            loader.load("stack", streaming(LAYERS, 0, 1, 2, source="ring"))
        assert (sim.live_bytes(), sim.pinned_bytes()) == before
        assert (meter.held(), loader.resident()) == ({}, ())
        module = loader.load("stack", streaming(LAYERS, 0, 1, 2, source="ring"))
        assert torch.equal(one_pass(module, loader.stream("stack"), x).cpu(), wanted)


@pytest.mark.parametrize("source", ["pinned", "ring"])
@simulated
def test_device_memory_that_fails_anywhere_leaves_nothing(tmp_path: Path, source: Any) -> None:
    with stack_on_npu(tmp_path) as (loader, meter, _, x, wanted):
        placement = streaming(LAYERS, 0, 1, 2, 3, source=source)
        before = sim.live_bytes()
        for number in range(1, 100):
            sim.fail_allocation(number)
            try:
                with loader.use("stack", False, placement) as module:
                    one_pass(module, loader.stream("stack"), x)
                    failed = False
            except torch.OutOfMemoryError:
                failed = True
            assert (sim.live_bytes(), meter.held(), loader.resident()) == (before, {}, ())
            if not failed:
                break
        assert number > 10
        sim.fail_allocation(0)
        module = loader.load("stack", placement)
        assert torch.equal(one_pass(module, loader.stream("stack"), x).cpu(), wanted)
        assert sim.races() == []
