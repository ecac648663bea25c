"""Copies to a device of its own memory: late copies, reused buffers, failed loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from toy_part import AS_LOADED, B_BYTES, PARTS, Grown, N, reference

from lowvram.offload import Loader, Meter, Part, Store
from lowvram.offload.device import CpuDevice
from lowvram.offload.staging import Staging


class LateLane:
    """Copies that run as late as they may: when a mark behind them, or the end, is waited for.

    A source that is overwritten before its copy is done gives wrong bytes then, as on a device.
    """

    def __init__(self) -> None:
        self.queue: list[tuple[Tensor, Tensor]] = []
        self.log: list[str] = []

    def host_buffer(self, nbytes: int) -> Tensor:
        self.log.append(f"buffer {nbytes}")
        return torch.empty(nbytes, dtype=torch.uint8)

    def trim_host(self) -> None:
        self.log.append("trim")

    def after_compute(self) -> None:
        self.log.append("after compute")

    def after(self, mark: LateMark) -> None:
        """Compute on the host is always done."""

    def compute_mark(self) -> LateMark:
        return LateMark(self, 0)

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.dtype == source.dtype
        self.queue.append((target, source))

    def mark(self) -> LateMark:
        return LateMark(self, len(self.queue))

    def run(self, count: int) -> None:
        for target, source in self.queue[:count]:
            target.copy_(source)
        self.queue[:count] = [(torch.empty(0), torch.empty(0))] * count

    def wait(self, mark: LateMark) -> None:
        self.log.append("compute waits")
        self.run(mark.count)


class LateMark:
    def __init__(self, lane: LateLane, count: int) -> None:
        self.lane, self.count = lane, count

    def synchronize(self) -> None:
        self.lane.log.append("wait")
        self.lane.run(self.count)


class LaneDevice(CpuDevice):
    """Host memory that is written through a lane, as an accelerator's is."""

    def __init__(self) -> None:
        super().__init__()
        self.lane = LateLane()

    def copy_lane(self) -> LateLane:
        return self.lane


def test_staged_parts_are_the_same_as_read_in_place(store: Store) -> None:
    device = LaneDevice()
    loader = Loader(store, device, Meter(device), PARTS)
    x = torch.randn(2, N)
    assert torch.allclose(loader.load("toy")(x), reference(x), atol=1e-6)
    loader.drop("toy")
    loader.load("small")
    assert torch.allclose(loader.load("toy")(x), reference(x), atol=1e-6)
    assert loader.bytes_host_to_device == 2 * AS_LOADED + B_BYTES
    log = device.lane.log
    assert [entry for entry in log if "buffer" in entry] == ["buffer 33554432"] * 2
    assert log[2:] == ["after compute", "compute waits"] * 3


@pytest.mark.parametrize("buffer_bytes", [64, 128, 256, 1024, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_buffer_is_overwritten_before_its_copies_are_done(
    tmp_path: Path, buffer_bytes: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    shapes = [(3, 7), (1,), (129,), (), (0, 4), (40, 5), (16,)]
    tensors = {f"t{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    tensors["t7"] = torch.randint(0, 99, (33,), dtype=torch.int64)
    save_file(tensors, tmp_path / "model.safetensors")
    lane = LateLane()
    with Store.open(tmp_path) as store:
        staging = Staging(store, lane, buffer_bytes)
        wanted = {n: t if t.dtype == torch.int64 else t.to(dtype) for n, t in tensors.items()}
        for _ in range(2):
            filled = {n: torch.zeros_like(t) for n, t in wanted.items()}
            staging.begin()
            for name, out in filled.items():
                staging.fill(name, out)
            staging.finish()
            assert all(torch.equal(filled[n], wanted[n]) for n in wanted)
    assert ("wait" in lane.log) == (buffer_bytes < 1 << 20)


def test_a_device_is_quiet_before_memory_of_a_failed_load_is_given_back(store: Store) -> None:
    class Recorded(LaneDevice):
        def synchronize(self) -> None:
            self.lane.log.append(f"synchronize, {len(self.lane.queue)} queued")
            self.lane.run(len(self.lane.queue))

        def empty_cache(self) -> None:
            self.lane.log.append("empty_cache")

    device = Recorded()
    loader = Loader(store, device, Meter(device), [Part("p", "b.", Grown, torch.float32)])
    with pytest.raises(torch.OutOfMemoryError):
        loader.load("p")
    assert device.lane.log[-2:] == ["synchronize, 1 queued", "empty_cache"]
