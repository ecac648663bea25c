"""Units through slabs on the CPU and on meta: same results, little memory, clean ends."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from streamed_part import (
    HEAD_ROWS,
    WIDTH,
    Layer,
    Stack,
    loader_of,
    one_pass,
    stack_part,
    streaming,
    unit_bytes,
    write_stack,
)
from torch import Tensor, nn

from lowvram.errors import CheckpointError
from lowvram.offload import Loader, Meter, Part, Placement, Store, blob_bytes, open_device
from lowvram.offload.blob import Blob, BlobReader
from lowvram.offload.pinned import pinned_blocks, pinned_bytes
from lowvram.offload.skeleton import Skeleton

LAYERS = 5
UNITS = LAYERS + 3


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Store]:
    write_stack(tmp_path, LAYERS)
    with Store.open(tmp_path) as opened:
        yield opened


def on_cpu(store: Store) -> tuple[Loader, Meter]:
    return loader_of(store, open_device("cpu"), LAYERS)


def resident_result(store: Store, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    loader, _ = loader_of(store, open_device("cpu"), LAYERS, dtype)
    return one_pass(loader.load("stack"), loader.stream("stack"), x)


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("lowvram-reader")]


SETS = [s for n in (1, 2, 3, 5, 8) for s in itertools.combinations(range(UNITS), n)][::7]


@pytest.mark.parametrize("slabs", [1, 2, 3])
def test_every_pass_is_the_resident_one_bit_for_bit(stack: Store, slabs: int) -> None:
    loader, _ = on_cpu(stack)
    x = torch.randn(2, WIDTH)
    wanted = resident_result(stack, x)
    for streamed in SETS:
        with loader.use("stack", False, streaming(LAYERS, *streamed, slabs=slabs)) as module:
            stream = loader.stream("stack")
            assert stream.streams
            for _ in range(3):
                assert torch.equal(one_pass(module, stream, x), wanted), streamed
    assert readers() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_stored_in_another_type_is_converted(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    write_stack(tmp_path, LAYERS, stored)
    x = torch.randn(2, WIDTH, dtype=dtype)
    with Store.open(tmp_path) as store:
        wanted = resident_result(store, x, dtype)
        loader, _ = loader_of(store, open_device("cpu"), LAYERS, dtype)
        module = loader.load("stack", streaming(LAYERS, *range(UNITS)))
        assert torch.equal(one_pass(module, loader.stream("stack"), x), wanted)
        assert module.get_buffer("layers.1.scale").dtype == torch.float16
        loader.close()


def test_a_unit_may_be_used_often_while_it_is_there(stack: Store) -> None:
    loader, _ = on_cpu(stack)
    module = loader.load("stack", streaming(LAYERS, 0, 1, 2))
    chunks = torch.randn(4, WIDTH).split(1)
    wanted = [resident_result(stack, x) for x in chunks]
    stream = loader.stream("stack")
    states = list(chunks)
    for index in range(LAYERS):
        with stream.unit(index) as layer:
            states = [layer(x) for x in states]
    loaded = loader.bytes_streamed
    assert isinstance(module, Stack)
    found = [torch.cat([piece(module.norm(x)) for piece in module.pieces], -1) for x in states]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    # Once through, and the first two again, for the next pass.
    assert loaded == sum(unit_bytes(LAYERS, unit) for unit in (0, 1, 2, 0, 1))
    loader.close()


@pytest.mark.parametrize("stop", range(UNITS))
def test_a_pass_that_ended_early_can_begin_again(stack: Store, stop: int) -> None:
    loader, _ = on_cpu(stack)
    x = torch.randn(2, WIDTH)
    module, wanted = (
        loader.load("stack", streaming(LAYERS, 0, 1, 3, 5, 7)),
        resident_result(stack, x),
    )
    stream = loader.stream("stack")
    for announced in (True, False):
        for index in range(stop):
            with stream.unit(index):
                pass
        with pytest.raises(ZeroDivisionError), stream.unit(stop):
            raise ZeroDivisionError
        if announced:
            stream.restart()
        assert torch.equal(one_pass(module, stream, x), wanted)
    loader.close()


def test_units_may_be_left_out(stack: Store) -> None:
    loader, _ = on_cpu(stack)
    loader.load("stack", streaming(LAYERS, *range(UNITS)))
    stream = loader.stream("stack")
    for index in (0, 4, 6, 0, 1, 5):
        with stream.unit(index) as unit:
            wanted = stack.read("m.head.weight") if index >= LAYERS else None
            weight = next(unit.parameters())
            if wanted is None:
                wanted = stack.read(f"m.layers.{index}.up.weight")
            else:
                wanted = wanted[8 * (index - LAYERS) :][: len(weight)]
            assert torch.equal(weight, wanted)
    loader.close()


def test_one_streamed_unit_at_a_time(stack: Store) -> None:
    loader, _ = on_cpu(stack)
    x = torch.randn(1, WIDTH)
    module, wanted = loader.load("stack", streaming(LAYERS, 0, 1, 2)), resident_result(stack, x)
    stream = loader.stream("stack")
    with (
        stream.unit(0),
        stream.unit(4),  # one that stays is always there
        pytest.raises(RuntimeError, match="while another one is in use"),
        stream.unit(1),
    ):
        pass
    assert torch.equal(one_pass(module, stream, x), wanted)
    loader.close()


def test_what_stays_and_the_slabs_are_held(stack: Store) -> None:
    loader, meter = on_cpu(stack)
    placement = streaming(LAYERS, 1, 2, 4, 6)
    with meter.phase("prefill"), torch.inference_mode():
        module = loader.load("stack", placement)
        x = torch.zeros(1, WIDTH)
        one_pass(module, loader.stream("stack"), x)
        loader.drop("stack")
    layer_0 = 4 * (8 * WIDTH + 8 + 8 * WIDTH) + 8 + 2 * WIDTH
    layer_3 = layer_0
    resident = layer_0 + layer_3 + 4 * 2 * WIDTH + 4 * (8 + 4) * WIDTH
    peak = meter.phases[0].peak_by_owner
    assert (peak["weights"], peak["slabs"]) == (resident, 2 * placement.slab_bytes)
    assert peak["activations"] < 2 * HEAD_ROWS * 4 + 10 * 4 * WIDTH
    assert meter.held() == {}


def test_slabs_are_allocated_once_and_never_moved(stack: Store) -> None:
    loader, _ = on_cpu(stack)
    module = loader.load("stack", streaming(LAYERS, 0, 1, 2, 3))
    stream = loader.stream("stack")

    def places() -> list[int]:
        return [p.data_ptr() for p in module.parameters()]

    before = places()
    assert all(place % 64 == 0 for place in before)
    for _ in range(2):
        one_pass(module, stream, torch.zeros(1, WIDTH))
        assert places() == before
    loader.close()


def test_units_that_stream_are_used_as_stored(stack: Store) -> None:
    loader, _ = on_cpu(stack)
    module = loader.load("stack", streaming(LAYERS, 1, 3))
    assert isinstance(module, Stack)
    layers = [layer for layer in module.layers if isinstance(layer, Layer)]
    assert [layer.prepared for layer in layers] == [1, 0, 1, 0, 1]
    loader.close()


def test_another_placement_loads_anew_and_an_equal_one_does_not(stack: Store) -> None:
    loader, meter = on_cpu(stack)
    x = torch.randn(1, WIDTH)
    wanted = resident_result(stack, x)
    first = streaming(LAYERS, 1, 3)
    module = loader.load("stack", first)
    read = stack.bytes_read
    assert loader.placement("stack") == first
    loader.load("stack", streaming(LAYERS, 1, 3))
    assert stack.bytes_read <= read + 2 * unit_bytes(LAYERS, 1)  # reading ahead at most
    for placement in (streaming(LAYERS, 0, 1, 2), None, Placement(), first):
        assert loader.load("stack", placement) is module
        assert loader.stream("stack").streams == bool(placement and placement.streamed)
        assert torch.equal(one_pass(module, loader.stream("stack"), x), wanted)
        assert loader.resident() == ("stack",)
    loader.close()
    assert meter.held() == {}


def test_a_drop_frees_slabs_and_thread(stack: Store) -> None:
    loader, _ = on_cpu(stack)
    module = loader.load("stack", streaming(LAYERS, *range(UNITS)))
    stream = loader.stream("stack")
    one_pass(module, stream, torch.zeros(1, WIDTH))
    held = weakref.ref(next(module.parameters()).untyped_storage())
    assert len(readers()) == 1
    loader.drop("stack")
    assert readers() == []
    assert {t.device.type for t in [*module.parameters(), *module.buffers()]} == {"meta"}
    gc.collect()
    assert held() is None  # though somebody still has the stream
    with pytest.raises(RuntimeError, match="after its part was dropped"), stream.unit(0):
        pass
    with pytest.raises(RuntimeError, match="'stack' are asked for, but it is not loaded"):
        loader.stream("stack")


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


@pytest.mark.parametrize("slabs", [2, 3])
def test_units_are_read_while_the_one_before_is_computed_with(
    stack: Store, monkeypatch: pytest.MonkeyPatch, slabs: int
) -> None:
    read: list[int] = []
    plain, more = BlobReader.read, threading.Condition()

    def seen(self: BlobReader, memory: Tensor) -> None:
        plain(self, memory)
        with more:
            read.append(memory.nbytes)
            more.notify()

    monkeypatch.setattr(BlobReader, "read", seen)
    loader, _ = on_cpu(stack)
    loader.load("stack", streaming(LAYERS, *range(LAYERS), slabs=slabs))
    stream = loader.stream("stack")
    for used in range(2 * LAYERS):
        with stream.unit(used % LAYERS), more:
            # This one, and as many more as there are other slabs; not one byte beyond.
            assert more.wait_for(lambda: len(read) == used + slabs, timeout=30)  # noqa: B023
    loader.close()


class Halving(Store):
    """Reads less than asked for, as a file system may."""

    def _read_at(self, file: Any, buffers: Sequence[memoryview], offset: int) -> int:
        short = buffers[0][: max(1, len(buffers[0]) // 2)]
        return super()._read_at(file, [short] if len(buffers) < 3 else buffers[:2], offset)


def test_short_reads_go_on_where_they_ended(stack: Store, tmp_path: Path) -> None:
    x = torch.randn(2, WIDTH)
    wanted = resident_result(stack, x)
    with Halving.open(tmp_path) as short:
        loader, _ = on_cpu(short)
        module = loader.load("stack", streaming(LAYERS, *range(UNITS)))
        assert torch.equal(one_pass(module, loader.stream("stack"), x), wanted)
        loader.close()


class Failing(Store):
    """Fails at the read of that number, once."""

    fails_at = 0
    reads = 0
    interrupted = False

    def _read_at(self, file: Any, buffers: Sequence[memoryview], offset: int) -> int:
        self.reads += 1
        if self.reads == self.fails_at:
            raise KeyboardInterrupt if self.interrupted else OSError(5, "Input/output error")
        return super()._read_at(file, buffers, offset)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_read_that_fails_anywhere_is_told_and_leaves_nothing(
    stack: Store, tmp_path: Path, interrupted: bool
) -> None:
    x = torch.randn(2, WIDTH)
    wanted = resident_result(stack, x)
    placement = streaming(LAYERS, 0, 1, 2, 3)
    number, failed = 0, True
    while failed:
        number, failed = number + 1, False
        with Failing.open(tmp_path) as store:
            assert isinstance(store, Failing)
            store.interrupted, store.fails_at = interrupted, number
            loader, meter = on_cpu(store)
            try:
                with loader.use("stack", False, placement) as module:
                    for _ in range(2):
                        found = one_pass(module, loader.stream("stack"), x)
                        assert torch.equal(found, wanted)
            except (KeyboardInterrupt, CheckpointError) as error:
                assert isinstance(error, KeyboardInterrupt) == interrupted
                failed = True
            assert (meter.held(), loader.resident(), readers()) == ({}, (), [])
            store.fails_at = 0
            module = loader.load("stack", placement)
            assert torch.equal(one_pass(module, loader.stream("stack"), x), wanted)
            loader.close()
    assert number > 20


def test_a_stream_goes_on_after_a_read_that_failed_once(stack: Store, tmp_path: Path) -> None:
    x = torch.randn(2, WIDTH)
    wanted = resident_result(stack, x)
    with Failing.open(tmp_path) as store:
        assert isinstance(store, Failing)
        loader, _ = on_cpu(store)
        module = loader.load("stack", streaming(LAYERS, *range(UNITS)))
        stream = loader.stream("stack")
        one_pass(module, stream, x)
        store.fails_at = store.reads + 4
        with pytest.raises(CheckpointError, match="Input/output error"):
            for _ in range(2):
                one_pass(module, stream, x)
        stream.restart()
        assert torch.equal(one_pass(module, stream, x), wanted)
        loader.close()


def test_memory_that_fails_anywhere_in_a_load_leaves_nothing(
    stack: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, meter = on_cpu(stack)
    loader.nbytes("stack")  # the shapes alone
    plain, left = torch.empty, 0

    def empty(*shape: Any, **options: Any) -> Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return plain(*shape, **options)

    monkeypatch.setattr(torch, "empty", empty)
    placement = streaming(LAYERS, 0, 1, 2, 3)
    for number in range(1, 100):
        left = number
        with meter.phase("prefill"):
            try:
                loader.load("stack", placement)
            except RuntimeError as error:
                assert "can't allocate" in str(error)
                assert meter._ledger is not None and meter._ledger.live_bytes == 0
            else:
                break
        assert (meter.held(), loader.resident(), readers()) == ({}, (), [])
    assert number > 10
    loader.close()


def test_a_thread_that_cannot_start_is_an_error_that_leaves_nothing(
    stack: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    loader, meter = on_cpu(stack)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        loader.load("stack", streaming(LAYERS, 0, 1, 2))
    assert (meter.held(), loader.resident()) == ({}, ())


def test_slabs_that_are_too_small_are_refused(stack: Store) -> None:
    loader, meter = on_cpu(stack)
    with pytest.raises(ValueError, match="2 slabs of 512 bytes cannot take units of up to"):
        loader.load("stack", Placement(streamed=(0, 1, 2), slabs=2, slab_bytes=512))
    assert meter.held() == {}


@pytest.mark.parametrize("with_store", [True, False])
def test_on_meta_slabs_are_counted_and_nothing_is_read(stack: Store, with_store: bool) -> None:
    loader, meter = loader_of(stack if with_store else None, open_device("meta"), LAYERS)
    placement = streaming(LAYERS, 0, 2, 3, 5)
    with meter.phase("decode"):
        module = loader.load("stack", placement)
        out = one_pass(module, loader.stream("stack"), torch.empty(1, WIDTH, device="meta"))
    assert out.shape == (1, HEAD_ROWS)
    assert meter.held()["slabs"] == 2 * placement.slab_bytes
    assert (stack.bytes_read, loader.bytes_streamed, readers()) == (0, 0, [])
    loader.close()
    assert meter.held() == {}


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


def test_a_part_without_units_has_a_stream_that_waits_for_nothing(stack: Store) -> None:
    device = open_device("cpu")
    part = stack_part(LAYERS, units=lambda module: ())
    loader = Loader(stack, device, Meter(device), [part])
    loader.load("stack")
    assert not loader.stream("stack").streams
    loader.stream("stack").restart()


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
