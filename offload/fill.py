"""Giving a part's resident tensors memory on the device, and their values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from .blob import Blob
from .device import Device
from .placement import aligned
from .skeleton import Slot, place_in_files
from .staging import Staging
from .store import Store


def allocate(slots: Sequence[Slot], device: Device, *, together: bool) -> int:
    """Hang uninitialised memory in every slot that the loader fills; returns its bytes.

    `together` is for an allocator that rounds up: what is not replaced after loading stands in one
    block then, and every tensor counts as aligned.
    """
    wanted = [slot for slot in slots if not slot.filled_by_owner]
    kept = [slot for slot in wanted if together and _stays(slot, device)]
    held = 0
    if kept:
        blob = Blob.of(kept)
        block = torch.empty(blob.nbytes, dtype=torch.uint8, device=device.torch)
        for slot, view in zip(kept, blob.views(block), strict=True):
            slot.put(view)
        held += blob.nbytes
    inside = {id(slot) for slot in kept}
    for slot in wanted:
        if id(slot) not in inside:
            shape, dtype = slot.empty.shape, slot.empty.dtype
            slot.put(torch.empty(shape, dtype=dtype, device=device.torch))
            held += aligned(slot.empty.nbytes) if together else slot.empty.nbytes
    return held


def _stays(slot: Slot, device: Device) -> bool:
    """Whether the tensor is still used after `after_load` of its module."""
    if not hasattr(slot.owner, "after_load"):
        return True
    keeps: Callable[[str], bool] = getattr(slot.owner, "keeps_stored", lambda device_type: False)
    return keeps(device.type)


def read(store: Store, slots: Iterable[Slot], staging: Staging | None) -> int:
    """Fill the slots in the order their bytes lie in the files; returns bytes written."""
    written = 0
    if staging is not None:
        staging.begin()
    wanted = [slot for slot in slots if not slot.filled_by_owner]
    for slot in sorted(wanted, key=lambda s: place_in_files(store, s)):
        out = slot.tensor
        if staging is not None:
            staging.fill(slot.stored, out, slot.first_element)
        else:
            store.read_flat(slot.stored, slot.first_element, out.detach().view(-1))
        written += out.nbytes
    if staging is not None:
        staging.finish()
    return written


def stored_rows(store: Store | None, slot: Slot) -> Callable[[int, int], torch.Tensor]:
    """What `fill_from` is given: rows [n, ...] of the slot's stored tensor, in the slot's type on
    the CPU, or on meta where there is nothing to read."""
    shape, dtype = slot.empty.shape, slot.empty.dtype

    def rows(start: int, stop: int) -> torch.Tensor:
        place = "meta" if store is None else "cpu"
        out = torch.empty((stop - start, *shape[1:]), dtype=dtype, device=place)
        if store is not None:
            first = slot.first_element + start * (slot.empty.numel() // shape[0])
            store.read_flat(slot.stored, first, out.view(-1))
        return out

    return rows


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Its parameters and buffers and those of all below it."""
    return [*module.parameters(), *module.buffers()]


def bytes_of(tensors: Iterable[torch.Tensor], *, together: bool) -> int:
    """Bytes of their distinct storages, as `allocate` counts them."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    sizes = {storage._cdata: storage.nbytes() for storage in storages}.values()
    return sum(aligned(size) if together else size for size in sizes)
