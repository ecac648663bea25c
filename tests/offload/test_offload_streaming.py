"""Units through slabs on the CPU and on meta: same results, little memory, clean ends."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from pathlib import Path

import pytest
import torch
from streamed_part import (
    HEAD_ROWS,
    LAYERS,
    WIDTH,
    Layer,
    Stack,
    loader_of,
    on_cpu,
    one_pass,
    readers,
    resident_result,
    stack_part,
    streaming,
    unit_bytes,
    write_stack,
)
from torch import Tensor

from lowvram.offload import Loader, Meter, Placement, Store, open_device
from lowvram.offload.blob import BlobReader

UNITS = LAYERS + 3


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


def test_a_part_without_units_has_a_stream_that_waits_for_nothing(stack: Store) -> None:
    device = open_device("cpu")
    part = stack_part(LAYERS, units=lambda module: ())
    loader = Loader(stack, device, Meter(device), [part])
    loader.load("stack")
    assert not loader.stream("stack").streams
    loader.stream("stack").restart()
