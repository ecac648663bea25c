"""Replayed calls: the same peaks as when everything is run, with few calls that are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvram.bench.memory_replay import RUNS, Replay
from lowvram.engine.scratch import metered_scratch
from lowvram.offload import Meter, open_device
from lowvram.quant import Scratch


class Layer(nn.Module):
    """Takes four times its input on the way."""

    def __init__(self, width: int, in_place: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.in_place = in_place
        self.ran = 0

    def forward(self, x: Tensor, start: int, windows: list[int]) -> Tensor:
        self.ran += 1
        wide = x.repeat(len(windows), 1)
        y = self.linear(x)
        del wide
        return x.add_(y) if self.in_place else y


class Net(nn.Module):
    def __init__(self, **kind: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(8, **kind) for _ in range(4))

    def forward(self, x: Tensor, windows: list[int]) -> Tensor:
        for start, layer in enumerate(self.layers):
            x = layer(x, start, windows)
        return x

    @property
    def ran(self) -> int:
        return sum(layer.ran for layer in self.layers)  # type: ignore[misc]


def phases(replayed: bool, **kind: Any) -> tuple[dict[str, int], int]:
    meter = Meter(open_device("meta"))
    build = Replay(meter).building(lambda: Net(**kind)) if replayed else lambda: Net(**kind)
    with torch.device("meta"):
        net = build()
    for name, rows, windows in (("a", 10, [1]), ("b", 10, [1, 2, 3]), ("b", 20, [1])):
        with meter.phase(name), torch.inference_mode():
            for _ in range(5):
                x = torch.empty(rows, 8, device="meta")
                y = net(x, windows)
                if len(meter.phases) == 1:
                    kept = torch.empty(100, device="meta")
                    del kept
            assert (y.shape, y.dtype) == ((rows, 8), torch.float32)
            assert (y is x) == kind.get("in_place", False)
    return {p.name: p.peak_bytes for p in meter.phases}, net.ran  # type: ignore[attr-defined]


@pytest.mark.parametrize("in_place", [False, True])
def test_peaks_are_those_of_a_full_run(in_place: bool) -> None:
    full, ran = phases(False, in_place=in_place)
    again, reran = phases(True, in_place=in_place)
    assert again == full
    assert ran == 3 * 5 * 4
    assert reran == 3 * RUNS  # three kinds of call: two shapes, two lists of windows


class Unpacking(nn.Module):
    """Takes its place in a scratch that is shared."""

    def __init__(self, scratch: Scratch, nbytes: int) -> None:
        super().__init__()
        self.__dict__["scratch"], self.nbytes = scratch, nbytes

    def forward(self, x: Tensor) -> Tensor:
        self.scratch.take(x.device, ((self.nbytes,), torch.uint8))  # type: ignore[operator]
        wide = x.repeat(3, 1)
        return wide[: len(x)] * 2


@pytest.mark.parametrize("layers", [1, 3])
def test_scratch_is_taken_again_in_every_entry_of_a_phase(layers: int) -> None:
    def peak(replayed: bool) -> dict[str, int]:
        meter = Meter(open_device("meta"))
        scratch = metered_scratch(meter)

        def build() -> nn.Module:
            net = nn.Module()
            sizes = [*[4096] * layers, 6400]
            net.layers = nn.ModuleList(Unpacking(scratch, size) for size in sizes)
            return net

        net = Replay(meter, scratch=scratch).building(build)() if replayed else build()
        kept = []
        for _ in range(4):
            with meter.phase("turns"):
                x = torch.empty(10, 8, device="meta")
                for layer in net.layers:  # type: ignore[union-attr]
                    x = layer(x)
                scratch.free()
            with meter.phase("turns"):
                kept.append(torch.empty(100, device="meta"))
                meter.hold("kv", str(len(kept)), kept[-1].nbytes, [kept[-1]])
        return meter.phases[0].peak_by_owner

    assert peak(True) == peak(False)
    assert peak(False)["workspace"] == 6400


def test_what_gives_no_tensor_is_always_run() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ran = 0

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.ran += 1
            return x, x

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList([Pair()])

    net = Replay(Meter(open_device("meta"))).building(Two)()
    pair = net.members[0]  # type: ignore[index]
    for _ in range(9):
        pair(torch.empty(3, device="meta"))
    assert pair.ran == 9
