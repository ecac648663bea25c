"""Parts on demand: filled from the file, counted, and really gone when dropped."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from toy_part import (
    AS_LOADED,
    AS_PREPARED,
    B_BYTES,
    Grown,
    K,
    N,
    Packed,
    Toy,
    loader_on,
    reference,
    toy_tensors,
)

from lowvram.errors import CheckpointError
from lowvram.offload import Loader, Meter, Part, Store, open_device


def test_a_part_computes_with_the_file_s_tensors(store: Store) -> None:
    loader, _ = loader_on(store)
    x = torch.randn(2, N)
    assert torch.allclose(loader.load("toy")(x), reference(x), atol=1e-6)


def test_types_follow_the_part_except_pinned_and_integer_ones(store: Store) -> None:
    loader = Loader(
        store,
        open_device("cpu"),
        Meter(open_device("cpu")),
        [Part("toy", "a.", Toy, torch.bfloat16)],
    )
    found = {n: t.dtype for n, t in loader.load("toy").state_dict().items()}
    assert found == {
        "inner.0.weight": torch.bfloat16,
        "inner.0.bias": torch.bfloat16,
        "inner.1.weight": torch.bfloat16,
        "inner.1.bias": torch.bfloat16,
        "inner.2.scales": torch.float16,
        "steps": torch.int64,
        "extra": torch.bfloat16,
    }
    assert not any(p.requires_grad for p in loader.load("toy").parameters())
    assert not loader.load("toy").training


@pytest.mark.parametrize("inference", [False, True])
def test_on_demand_and_resident_give_the_same_bits(store: Store, inference: bool) -> None:
    loader, _ = loader_on(store)
    x = torch.randn(3, N)
    with torch.inference_mode(inference):
        resident = loader.load("toy")(x)
        assert torch.equal(loader.load("toy")(x), resident)
        for _ in range(3):
            loader.drop("toy")
            with loader.use("toy", keep=False) as toy:
                assert torch.equal(toy(x), resident)


def test_weights_loaded_in_inference_mode_can_be_used_outside(store: Store) -> None:
    loader, _ = loader_on(store)
    with torch.inference_mode():
        module = loader.load("small")
    x = torch.ones(1, 4, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None


def test_bytes_read_and_written_are_counted(store: Store) -> None:
    loader, _ = loader_on(store)
    assert loader.nbytes("toy") == AS_LOADED
    assert loader.bytes_host_to_device == store.bytes_read == 0
    loader.load("toy")
    assert loader.bytes_host_to_device == AS_LOADED
    loader.load("toy")
    assert loader.bytes_host_to_device == AS_LOADED
    loader.load("small")
    stored = sum(t.nbytes for t in toy_tensors().values())
    assert store.bytes_read == stored
    loader.drop("toy")
    loader.load("toy")
    assert loader.bytes_host_to_device == 2 * AS_LOADED + B_BYTES


def test_only_the_part_s_own_tensors_are_read(store: Store) -> None:
    loader, _ = loader_on(store)
    loader.load("small")
    assert store.bytes_read == B_BYTES


def test_tensors_are_read_in_the_order_of_the_file(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets: list[int] = []
    plain = Store.read_flat

    def seen(self: Store, name: str, start: int, out: Tensor) -> None:
        offsets.append(self.info(name).offset)
        plain(self, name, start, out)

    monkeypatch.setattr(Store, "read_flat", seen)
    loader_on(store)[0].load("toy")
    assert len(offsets) == 8
    assert offsets == sorted(offsets)


def test_storages_are_aligned_for_vector_kernels(store: Store) -> None:
    loader, _ = loader_on(store)
    for tensor in loader.load("toy").state_dict().values():
        assert tensor.data_ptr() % 64 == 0


def test_what_is_resident_is_known_and_held(store: Store) -> None:
    loader, meter = loader_on(store)
    assert loader.resident() == ()
    with loader.use("small", keep=True):
        pass
    with loader.use("toy", keep=False):
        assert loader.resident() == ("small", "toy")
        assert meter.held() == {"weights": AS_PREPARED + B_BYTES}
    assert loader.is_resident("small")
    assert not loader.is_resident("toy")
    assert meter.held() == {"weights": B_BYTES}
    loader.close()
    assert loader.resident() == ()
    assert meter.held() == {}
    assert store.has("b.weight")


def test_a_drop_frees_the_memory(store: Store) -> None:
    loader, _ = loader_on(store)
    module = loader.load("toy")
    storages = [weakref.ref(t.untyped_storage()) for t in module.state_dict().values()]
    storages.append(weakref.ref(module.get_buffer("inner.2.ready").untyped_storage()))
    assert all(ref() is not None for ref in storages)
    loader.drop("toy")
    gc.collect()
    assert [ref() for ref in storages] == [None] * len(storages)
    assert {t.device.type for t in module.state_dict().values()} == {"meta"}
    loader.drop("toy")


def test_a_load_again_is_the_same_module_with_the_same_values(store: Store) -> None:
    loader, _ = loader_on(store)
    module = loader.load("toy")
    before = {n: t.clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}
    loader.drop("toy")
    assert loader.load("toy") is module
    after = dict([*module.named_parameters(), *module.named_buffers()])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    packed = module.get_submodule("inner.2")
    assert isinstance(packed, Packed)
    assert packed.loads == 2


def test_weights_loaded_inside_a_phase_are_weights_and_not_activations(store: Store) -> None:
    loader, meter = loader_on(store)
    x = torch.zeros(1, N)
    with meter.phase("prefill"), torch.inference_mode():
        y = loader.load("toy")(x)
        loader.drop("toy")
    (prefill,) = meter.phases
    # The largest tensor that is converted passes through a scratch buffer in its stored type.
    assert prefill.peak_by_owner == {"weights": AS_LOADED, "activations": 2 * K * N}
    with meter.phase("decode"):
        loader.load("small")
    assert meter.phases[1].peak_by_owner == {"weights": B_BYTES, "activations": 0}
    assert y.shape == (1, N)


def test_a_layout_derived_after_loading_counts_beside_what_it_replaces(store: Store) -> None:
    device = open_device("cpu")
    meter = Meter(device)
    loader = Loader(store, device, meter, [Part("packed", "a.inner.2.", Packed, torch.float32)])
    with meter.phase("decode"):
        loader.load("packed")
    assert meter.phases[0].peak_by_owner == {"weights": 4 * K * N + 2 * N, "activations": K * N}
    assert meter.held() == {"weights": K * N + 2 * N}


def test_conversion_needs_no_second_copy(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(4096, 1024)}, tmp_path / "model.safetensors")
    device = open_device("cpu")
    meter = Meter(device)
    part = Part("big", "", lambda: nn.Linear(1024, 4096, bias=False), torch.bfloat16)
    with Store.open(tmp_path) as store, meter.phase("prefill"):
        Loader(store, device, meter, [part]).load("big")
    owners = meter.phases[0].peak_by_owner
    assert owners == {"weights": 8 << 20, "activations": 4 << 20}  # the scratch buffer


@pytest.mark.parametrize("with_store", [True, False])
def test_on_meta_parts_cost_nothing_and_count_in_full(store: Store, with_store: bool) -> None:
    loader, meter = loader_on(store if with_store else None, "meta")
    with meter.phase("prefill"):
        toy = loader.load("toy")
        out = toy(torch.empty(2, N, device="meta"))
        loader.drop("toy")
        toy = loader.load("toy")
    assert out.shape == (2, N)
    assert meter.held() == {"weights": AS_PREPARED}
    weights = meter.phases[0].peak_by_owner["weights"]
    activations = meter.phases[0].peak_by_owner["activations"]
    assert weights in (AS_LOADED, AS_PREPARED)
    assert activations < AS_LOADED  # neither the skeleton nor the weights again
    assert loader.bytes_host_to_device == store.bytes_read == 0


def test_a_store_is_needed_where_there_is_memory() -> None:
    with pytest.raises(ValueError, match="needs a store"):
        loader_on(None, "cpu")


def test_an_unknown_part_names_the_known() -> None:
    loader, _ = loader_on(None, "meta")
    with pytest.raises(KeyError, match="no part 'toys'; the parts are toy, small"):
        loader.load("toys")


def test_a_buffer_that_no_file_holds_is_refused() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(3), persistent=False)

    device = open_device("meta")
    loader = Loader(None, device, Meter(device), [Part("t", "x.", Table, torch.float32)])
    with pytest.raises(ValueError, match=r"x\.table is a buffer that no checkpoint holds"):
        loader.load("t")


class Floats(nn.Module):
    """Wants floats where the file has integers."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.empty(K, N))


@pytest.mark.parametrize(
    ("part", "error", "complaint"),
    [
        (Part("p", "c.", lambda: nn.Linear(4, 5), torch.float32), CheckpointError, "'c.weight'"),
        (
            Part("p", "b.", lambda: nn.Linear(4, 6), torch.float32),
            CheckpointError,
            r"'b.weight' has shape \[5, 4\]; the model wants \[6, 4\]",
        ),
        (
            Part("p", "a.inner.2.", Floats, torch.float32),
            CheckpointError,
            "'a.inner.2.codes' has type I32; the model wants float32",
        ),
        (Part("p", "b.", Grown, torch.float32), torch.OutOfMemoryError, "no room"),
    ],
)
def test_a_load_that_fails_leaves_nothing(
    store: Store, part: Part, error: type[Exception], complaint: str
) -> None:
    device = open_device("cpu")
    meter = Meter(device)
    loader = Loader(store, device, meter, [part])
    with meter.phase("prefill"):
        with pytest.raises(error, match=complaint) as caught:
            loader.load("p")
        # The error, and so its frames, are alive; what they had allocated must not be.
        assert caught.value.__traceback__ is not None
        assert meter._ledger is not None
        assert meter._ledger.live_bytes == 0
    assert meter.held() == {}
    assert loader.resident() == ()


def test_an_allocator_s_error_passes_through_and_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, meter = loader_on(store)
    loader.load("small")
    plain, calls = torch.empty, []

    def empty(*shape: int, **options: Any) -> Tensor:
        calls.append(shape)
        if len(calls) == 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return plain(*shape, **options)

    loader.nbytes("toy")  # the shapes alone
    monkeypatch.setattr(torch, "empty", empty)
    with meter.phase("prefill"):
        with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
            loader.load("toy")
        assert caught.value.__traceback__ is not None
        assert meter._ledger is not None
        assert meter._ledger.live_bytes == 0
    assert meter.held() == {"weights": B_BYTES}
    monkeypatch.undo()
    x = torch.randn(1, N)
    assert torch.allclose(loader.load("toy")(x), reference(x), atol=1e-6)
