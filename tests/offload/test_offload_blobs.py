"""Blobs and slots: how units are laid out, read and pinned, and what modules fill themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from streamed_part import (
    HEAD_ROWS,
    LAYERS,
    WIDTH,
    stack_part,
    unit_bytes,
)
from torch import nn

from lowvram.errors import CheckpointError
from lowvram.offload import Loader, Meter, Part, Store, blob_bytes, open_device
from lowvram.offload.blob import Blob, BlobReader
from lowvram.offload.pinned import pinned_blocks, pinned_bytes
from lowvram.offload.skeleton import Skeleton


def test_neighbours_in_the_file_are_read_in_one_call(
    stack: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = Store._read_at

    def seen(self: Store, file: Any, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(len(buffers))
        return plain(self, file, buffers, offset)

    monkeypatch.setattr(Store, "_read_at", seen)
    skeleton = Skeleton(stack_part(LAYERS))
    blob = Blob.of(skeleton.unit_slots(1))
    BlobReader(stack, blob).read(torch.empty(blob.nbytes, dtype=torch.uint8))
    # Files hold wide types first: the step, then weights and bias, then the 16-bit scale.
    assert calls == [1, 3, 1]


def test_a_unit_s_bytes_are_its_tensors_each_aligned() -> None:
    assert blob_bytes([]) == 0
    assert blob_bytes([1, 512, 513, 0]) == 512 + 512 + 1024
    assert unit_bytes(LAYERS, 7) == 512  # 4 rows of 16 floats


def test_rows_of_a_stored_tensor_are_checked(stack: Store) -> None:
    class Beyond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stored_rows = ("head.weight", 16, 24)
            self.weight = nn.Parameter(torch.empty(8, WIDTH))

    device = open_device("cpu")
    loader = Loader(stack, device, Meter(device), [Part("p", "m.", Beyond, torch.float32)])
    with pytest.raises(CheckpointError, match=r"\[20, 16\].*wants \[8, 16\] for its rows 16 to 24"):
        loader.load("p")


class Sums(nn.Module):
    """Keeps the sum of each stored row instead of the rows."""

    fills = "weight"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(HEAD_ROWS, WIDTH))

    def fill_from(self, rows: Any, device: torch.device) -> None:
        del self._parameters["weight"]
        parts = [rows(start, min(start + 6, HEAD_ROWS)).sum(1) for start in range(0, HEAD_ROWS, 6)]
        self.register_buffer("sums", torch.cat(parts).to(device))


@pytest.mark.parametrize("name", ["cpu", "meta"])
def test_a_module_may_make_something_else_of_its_rows(stack: Store, name: str) -> None:
    device = open_device(name)
    meter = Meter(device)
    part = Part("sums", "m.head.", Sums, torch.bfloat16)
    loader = Loader(stack if name == "cpu" else None, device, meter, [part])
    for _ in range(2):
        with meter.phase("decode"):
            module = loader.load("sums")
        assert meter.held() == {"weights": 2 * HEAD_ROWS}
        if name == "cpu":
            wanted = stack.read("m.head.weight").to(torch.bfloat16).sum(1)
            assert torch.equal(module.get_buffer("sums"), wanted)
        loader.drop("sums")
        assert "weight" in module._parameters and "sums" not in module._buffers
        assert meter.held() == {}
    assert meter.phases[0].peak_bytes < 2 * HEAD_ROWS * WIDTH


def test_pinned_buffers_stand_in_few_blocks_of_a_power_of_two() -> None:
    mib = 1 << 20
    assert pinned_blocks([]) == []
    assert pinned_blocks([5, 512, 513]) == [(2048, 3)]
    for size, count, share in ((38 * mib + 5, 30, 1.07), (115 * mib + 512, 20, 1.07), (mib, 3, 1)):
        blocks = pinned_blocks([size] * count)
        assert sum(inside for _, inside in blocks) == count
        for nbytes, inside in blocks:
            assert nbytes & (nbytes - 1) == 0 and nbytes >= inside * size
        assert pinned_bytes([size] * count) <= share * count * size
    uneven = [3, 700, 90, 12_000, 512, 512]
    best = min(
        sum(1 << (blob_bytes(piece) - 1).bit_length() for piece in cut) for cut in _cuts(uneven)
    )
    assert pinned_bytes(uneven) == best


def _cuts(sizes: list[int]) -> Iterator[list[list[int]]]:
    """Every way to cut a list into pieces."""
    if not sizes:
        yield []
    for first in range(1, len(sizes) + 1):
        for rest in _cuts(sizes[first:]):
            yield [sizes[:first], *rest]
