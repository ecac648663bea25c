"""The races that the simulated accelerator finds, alone and in the loader."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import simdevice as sim
import torch
from simdevice import simulated
from toy_part import PARTS, N

from lowvram.offload import Loader, Meter, Store, open_device
from lowvram.offload.lane import StreamLane
from lowvram.offload.staging import Staging

MIB = 1 << 20
NPU = "npu:0"


def block(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=NPU)


def pinned(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)


# Each returns what the device may still use when it is over.
Used = tuple[torch.Tensor, ...]


def read_too_early(waits: bool) -> Used:
    slab, source, side = block(MIB), pinned(MIB), torch.npu.Stream()
    side.wait_stream(torch.npu.current_stream())
    with side:
        slab.copy_(source, non_blocking=True)
    if waits:
        torch.npu.current_stream().wait_event(side.record_event())
    return slab, source, slab.neg()


def overwritten_too_early(waits: bool) -> Used:
    slab, source, side = torch.zeros(MIB, dtype=torch.uint8, device=NPU), pinned(MIB), other()
    used = slab.neg()
    if waits:
        side.wait_stream(torch.npu.current_stream())
    with side:
        slab.copy_(source, non_blocking=True)
    return slab, source, used


def other() -> torch.Stream:
    """A stream that what was queued so far is finished for."""
    torch.npu.synchronize()
    return torch.npu.Stream()


def written_twice(waits: bool) -> Used:
    slab = block(MIB)
    first, second = other(), other()
    with first:
        slab.zero_()
    if waits:
        second.wait_stream(first)
    with second:
        slab.zero_()
    return (slab,)


def freed_in_use(waits: bool) -> Used:
    slab = block(MIB)
    side = other()
    with side:
        slab.zero_()
    if waits:
        slab.record_stream(side)
    return ()


def reused_in_use(waits: bool) -> Used:
    side = other()
    torch.zeros(MIB, dtype=torch.uint8, device=NPU)
    new = block(MIB)  # where the one before was, whose zeros may not be written yet
    if waits:
        side.wait_stream(torch.npu.current_stream())
    with side:
        new.zero_()
    return (new,)


def source_overwritten(waits: bool) -> Used:
    slab, source = block(MIB), pinned(MIB)
    slab.copy_(source, non_blocking=True)
    if waits:
        torch.npu.current_stream().synchronize()
    source[7] = 1
    return slab, source


def target_read_early(waits: bool) -> Used:
    slab, target = block(MIB).fill_(3), pinned(MIB)
    target.copy_(slab, non_blocking=True)
    if waits:
        torch.npu.current_stream().record_event().synchronize()
    assert target[5000].item() == (3 if waits else 255)
    torch.npu.synchronize()
    assert (target == 3).all()
    return slab, target


@pytest.mark.parametrize(
    ("misuse", "found"),
    [
        (read_too_early, "read before written: aten::neg on stream 0 does not wait for copy to"),
        (overwritten_too_early, "overwritten while read: copy to the device on stream 2 does not"),
        (written_twice, "written twice at once: aten::zero_ on stream 4 does not wait for aten::z"),
        (freed_in_use, "freed in use: give back of the host does not wait for aten::zero_ on str"),
        (reused_in_use, "written twice at once: aten::zero_ on stream 2 does not wait for the las"),
        (source_overwritten, "host overwrote: the source of a copy to the device on stream 0 "),
        (target_read_early, "host came early: the target of a copy from the device on stream 0 "),
    ],
)
def test_a_missing_wait_is_found_and_a_wait_is_believed(
    misuse: Callable[[bool], Used], found: str
) -> None:
    @simulated
    def both() -> None:
        sim.configure(h2d=1e15, d2h=1e15, hbm=1e15, launch=1.0)  # in time, everything is done
        for waits in (True, False):
            used = misuse(waits)
            torch.npu.synchronize()
            del used
            if waits:
                assert sim.races() == []
        (race,) = sim.races()
        assert race.startswith(found), race

    both()


@simulated
def test_parts_of_one_block_are_apart() -> None:
    """Two streams, each at its own half or its own columns; then at one row of the other's."""
    slab, side = torch.zeros(8, 512, device=NPU), torch.npu.Stream()
    torch.npu.synchronize()
    slab[:4].add_(1)
    slab[4:, :100].add_(1)
    with side:
        slab[4:, 100:].add_(1)
    assert not sim.races()
    with side:
        slab[3:4].add_(1)
    assert any(race.startswith("written twice") for race in sim.races())


def load_twice(store: Store) -> None:
    """A part comes and goes beside compute, through buffers smaller than it is."""
    device = open_device("npu")
    loader = Loader(store, device, Meter(device), PARTS)
    lane = device.copy_lane()
    assert lane is not None
    loader._staging = Staging(store, lane, buffer_bytes=2048)
    sim.reset()
    for _ in range(2):
        work = torch.ones(64, 64, device=NPU)
        for _ in range(4):
            work = work @ work
        del work
        module = loader.load("toy")
        module(torch.ones(2, N, device=NPU)).cpu()
        loader.drop("toy")
    loader.close()


@simulated
def test_loads_wait_for_what_they_must(store: Store) -> None:
    load_twice(store)
    assert sim.races() == []
    assert sim.live_bytes() == sim.pinned_bytes() == 0


def turn_at_once(staging: Staging) -> None:
    """The other buffer is used though copies out of it are under way."""
    staging._now, staging._used = 1 - staging._now, 0


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (StreamLane, "after", lambda lane, mark: None),
        (StreamLane, "wait", lambda lane, mark: None),
        (Staging, "_turn", turn_at_once),
    ],
    ids=["copies wait for compute", "compute waits for copies", "the host waits for copies"],
)
def test_loads_without_a_wait_are_found_out(
    owner: type,
    name: str,
    broken: Callable[..., None],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, broken)

    @simulated
    def careless() -> None:
        load_twice(store)
        assert sim.races()

    careless()
