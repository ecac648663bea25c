"""Streaming where something fails: a read, an allocation, a thread, the user's patience."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from streamed_part import (
    LAYERS,
    WIDTH,
    on_cpu,
    one_pass,
    readers,
    resident_result,
    streaming,
)
from torch import Tensor

from lowvram.errors import CheckpointError
from lowvram.offload import Placement, Store


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
        module = loader.load("stack", streaming(LAYERS, *range(LAYERS + 3)))
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
        module = loader.load("stack", streaming(LAYERS, *range(LAYERS + 3)))
        stream = loader.stream("stack")
        one_pass(module, stream, x)
        with stream.unit(0):
            pass
        store.fails_at = store.reads + 4
        failing = None
        for index in [*range(1, LAYERS + 3), *range(LAYERS)]:
            try:
                with stream.unit(index):
                    pass
            except CheckpointError as error:
                failing = index
                assert "Input/output error" in str(error)
        assert failing is not None
        with stream.unit(failing) as unit:  # as if nothing had been
            weight = next(unit.parameters())
            assert torch.equal(weight, stack.read(f"m.layers.{failing}.up.weight"))
        assert torch.equal(one_pass(module, stream, x), wanted)
        loader.close()


def test_a_unit_with_a_slab_to_itself_is_read_again_where_that_failed(
    stack: Store, tmp_path: Path
) -> None:
    with Failing.open(tmp_path) as store:
        assert isinstance(store, Failing)
        loader, _ = on_cpu(store)
        store.fails_at = 100
        loader.load("stack", streaming(LAYERS, 0, 1))
        with loader.stream("stack").unit(1):
            pass
        store.fails_at = store.reads - 2  # of unit 1, were it to be loaded again
        loader.drop("stack")
        store.reads = 0
        loader.load("stack", streaming(LAYERS, 0, 1))
        stream = loader.stream("stack")
        with pytest.raises(CheckpointError), stream.unit(1):
            pass
        for index in (1, 0, 1):
            with stream.unit(index) as unit:
                wanted = stack.read(f"m.layers.{index}.up.weight")
                assert torch.equal(next(unit.parameters()), wanted)
        loader.close()


def test_an_error_that_is_kept_keeps_no_slab(stack: Store, tmp_path: Path) -> None:
    with Failing.open(tmp_path) as store:
        assert isinstance(store, Failing)
        loader, _ = on_cpu(store)
        module = loader.load("stack", streaming(LAYERS, *range(LAYERS + 3)))
        stream = loader.stream("stack")
        held = weakref.ref(next(module.parameters()).untyped_storage())
        store.fails_at = store.reads + 12
        with pytest.raises(CheckpointError) as caught:
            for _ in range(2):
                one_pass(module, stream, torch.zeros(1, WIDTH))
        loader.drop("stack")
        gc.collect()
        assert caught.value.__traceback__ is not None and held() is None
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
