"""Modules on demand: built once without memory, filled from the store, dropped without a copy.

The file is the home of the weights and the device a cache: nothing is ever copied back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from . import heap
from .ahead import ReadAhead
from .blob import Blob
from .device import Device
from .feed import Feed
from .fill import allocate, bytes_of, read, stored_rows, tensors_of
from .frames import clear_frames
from .lane import CopyLane
from .meter import Meter
from .part import Part
from .placement import Placement, blob_bytes
from .skeleton import FillFrom, Skeleton, Slot, check_stored
from .slabs import Slabs
from .staging import Staging
from .store import Store
from .stream import UnitStream
from .supply import Supply, first_line


@dataclass
class _Loaded:
    """A part that is on the device, or on its way there or back."""

    skeleton: Skeleton
    placement: Placement | None
    feed: Feed | None = None
    stream: UnitStream | None = None


class Loader:
    """Loads and drops the parts of one checkpoint on one device, and tells the meter.

    `store` may be None on the device `meta`, where parts take no memory but are held in the meter
    at their true size.
    """

    def __init__(
        self, store: Store | None, device: Device, meter: Meter, parts: Iterable[Part]
    ) -> None:
        self._store, self._device, self._meter = store, device, meter
        self._parts = {part.name: part for part in parts}
        self._skeletons: dict[str, Skeleton] = {}
        self._loaded: dict[str, _Loaded] = {}
        self._held: dict[str, int] = {}  # part -> bytes of what stays
        self._lane: CopyLane | None = None
        self._staging: Staging | None = None
        self._supply = Supply(store, device)
        self._ahead = ReadAhead()
        self._bytes_resident = self._bytes_streamed = 0
        if store is None and device.type != "meta":
            raise ValueError(f"a loader on {device.name} needs a store to load from")

    @property
    def bytes_streamed(self) -> int:
        """Bytes of units written to slabs so far, each time they were."""
        under_way = (one.feed.bytes_fetched for one in self._loaded.values() if one.feed)
        return self._bytes_streamed + sum(under_way) if self._reads else 0

    @property
    def bytes_host_to_device(self) -> int:
        """Bytes of weights written to the device; on `cpu`, read into place."""
        return self._bytes_resident + self.bytes_streamed

    @property
    def notes(self) -> list[str]:
        """What was done otherwise than its placement says, and why; each once."""
        return self._supply.notes

    def put(self, part: Part) -> None:
        """Have `part` from now on in the place of the one of its name, which is dropped."""
        self.drop(part.name)
        self._skeletons.pop(part.name, None)
        self._supply.forget(part.name, self._lane)
        self._parts[part.name] = part

    def streams(self, name: str) -> bool:
        """Whether the part's units can stream: their modules use what is stored as it is."""
        skeleton = self._skeleton(name)
        slots = (slot for i in range(len(skeleton.units)) for slot in skeleton.unit_slots(i))
        return not any(slot.filled_by_owner for slot in slots)

    def load(self, name: str, placement: Placement | None = None) -> nn.Module:
        """The part, on the device, with the units that `placement` says passing through slabs.

        Nothing is done if it is there already with an equal placement; with another one it is
        dropped first. Raises `CheckpointError` if the store lacks one of its tensors or holds it in
        another shape or kind of number, `DeviceError` if no host memory can be pinned to stream
        from, and lets the allocator's error through. Nothing of it stays then.
        """
        if placement is not None and not placement.streamed:
            placement = None
        present = self._loaded.get(name)
        if present is not None and present.stream and present.placement == placement:
            return present.skeleton.module
        self.drop(name)
        skeleton = self._skeleton(name)
        if self._store is not None:
            for slot in skeleton.slots:
                check_stored(self._store, slot)
        # Plain tensors even in a caller's inference mode, so that they may be replaced outside it.
        with torch.inference_mode(False), torch.no_grad():
            try:
                self._loaded[name] = one = _Loaded(skeleton, placement)
                with heap.apart():
                    self._fill(name, one)
            except BaseException as error:
                self._device.synchronize()  # no copy may run into memory that is given back
                clear_frames(error)
                self.drop(name)
                raise
        return skeleton.module

    def _fill(self, name: str, one: _Loaded) -> None:
        """Load what stays, then make the slabs: what `after_load` needs for itself is gone then."""
        skeleton, placement = one.skeleton, one.placement
        streamed = placement.streamed if placement is not None else ()
        staying = skeleton.outside(streamed)
        inside = set(staying)
        slots = [slot for slot in skeleton.slots if slot.owner in inside]
        if self._lane is None:
            self._lane = self._device.copy_lane()
        held = allocate(slots, self._device, together=self._rounds)
        self._hold(name, skeleton.module, held)
        if self._reads and self._store is not None:
            self._bytes_resident += read(self._store, slots, self._staged(self._store))
        for slot in slots:
            if slot.filled_by_owner:
                self._fill_from(name, slot)
        # Members first: what is made of theirs is counted before their owner makes one of several.
        for module in reversed(staying):
            hook = getattr(module, "after_load", None)
            if hook is not None:
                self._finish(name, module, hook)
        if self._rounds:
            self._device.empty_cache()  # of what that took
        if placement is None or placement.source != "pinned":
            self._supply.forget(name, self._lane)
        if placement is not None:
            one.feed = self._feed(name, skeleton, placement)
            one.feed.begin(0)
        one.stream = UnitStream(skeleton.units, streamed, one.feed)

    def _finish(self, name: str, module: nn.Module, hook: Callable[[], None]) -> None:
        """Have a module do what it does once it is loaded, and count what it holds then."""
        before, blocks = self._size_of(tensors_of(module)), _blocks_of(module)
        hook()
        self._hold(name, module, self._size_of(tensors_of(module)) - before)
        if self._rounds and _blocks_of(module) != blocks:
            # Else the allocator keeps what was replaced, into which nothing fits that replaces it.
            self._device.empty_cache()

    def _hold(self, name: str, module: nn.Module, more: int) -> None:
        """Count the tensors of `module`, `more` bytes than before, as weights of part `name`."""
        self._held[name] = self._held.get(name, 0) + more
        self._meter.hold("weights", name, self._held[name], tensors_of(module))

    def _fill_from(self, name: str, slot: Slot) -> None:
        """Have the slot's module make what it wants of its stored rows."""
        fill_from = cast(FillFrom, slot.owner.fill_from)
        others = [t for n, t in slot.owner.named_parameters() if n != slot.local]
        before = self._size_of([*others, *slot.owner.buffers()])
        rows = stored_rows(self._store if self._reads else None, slot)

        def counted(start: int, stop: int) -> torch.Tensor:
            """Some modules read their rows when they are used, as often as they are."""
            read = rows(start, stop)
            if self._reads:
                self._bytes_resident += read.nbytes
            return read

        fill_from(counted, self._device.torch)
        self._hold(name, slot.owner, self._size_of(tensors_of(slot.owner)) - before)

    @property
    def _rounds(self) -> bool:
        """Whether the device has an allocator of its own, which rounds up."""
        return self._lane is not None

    def _size_of(self, tensors: Iterable[torch.Tensor]) -> int:
        return bytes_of(tensors, together=self._rounds)

    def _feed(self, name: str, skeleton: Skeleton, placement: Placement) -> Feed:
        blobs = [Blob.of(skeleton.unit_slots(index)) for index in placement.streamed]
        slabs = Slabs(blobs, placement.slabs, placement.slab_bytes, self._device.torch)
        self._meter.hold("slabs", name, slabs.block.nbytes, [slabs.block])
        carrier = self._supply.carrier(name, placement, blobs, slabs, self._lane)
        return Feed([blob.nbytes for blob in blobs], slabs, carrier)

    @property
    def _reads(self) -> bool:
        """Whether loading moves bytes; on `meta` it only counts them."""
        return self._store is not None and self._device.type != "meta"

    def _staged(self, store: Store) -> Staging | None:
        """The pinned buffers of loads; None where there is no need of any, or none to be had."""
        if self._staging is None and self._lane is not None:
            try:
                self._staging = Staging(store, self._lane)
            except (RuntimeError, MemoryError) as error:
                self._supply.note(
                    f"no host memory could be pinned, so modules load slowly ({first_line(error)})"
                )
        return self._staging

    def expect(self, name: str) -> None:
        """The part will be loaded soon: have the system read it from the disk meanwhile."""
        if self._store is not None and self._reads and name not in self._loaded:
            stored = {slot.stored for slot in self._skeleton(name).slots}
            self._ahead.begin(self._store.info(each) for each in stored if self._store.has(each))

    def drop(self, name: str) -> None:
        """Free the part's memory; the module stays, on meta. Nothing happens if it is not there."""
        one = self._loaded.get(name)
        if one is None:
            return
        one.stream = None
        if one.feed is not None:
            one.feed.close()
            self._bytes_streamed += one.feed.bytes_fetched
            one.feed = None
        one.skeleton.strip()
        self._meter.release("slabs", name)
        self._meter.release("weights", name)
        self._held.pop(name, None)
        self._loaded.pop(name, None)
        self._device.empty_cache()

    @contextmanager
    def use(self, name: str, keep: bool, placement: Placement | None = None) -> Iterator[nn.Module]:
        """The part, loaded inside the block, and dropped after it unless `keep`."""
        try:
            yield self.load(name, placement)
        finally:
            if not keep:
                self.drop(name)

    def stream(self, name: str) -> UnitStream:
        """The units of a part that is loaded."""
        one = self._loaded.get(name)
        if one is None or one.stream is None:
            raise RuntimeError(f"the units of {name!r} are asked for, but it is not loaded")
        return one.stream

    def nbytes(self, name: str) -> int:
        """Bytes the part's tensors take on the device as they are stored; loads nothing."""
        return self._skeleton(name).nbytes

    def unit_bytes(self, name: str) -> tuple[int, ...]:
        """Bytes of a slab that each of the part's units would need."""
        skeleton = self._skeleton(name)
        return tuple(
            blob_bytes(slot.empty.nbytes for slot in skeleton.unit_slots(index))
            for index in range(len(skeleton.units))
        )

    def is_resident(self, name: str) -> bool:
        """Whether the part is loaded, be it with units that stream."""
        return name in self._loaded

    def resident(self) -> tuple[str, ...]:
        """The parts on the device, in the order they were loaded."""
        return tuple(self._loaded)

    def close(self) -> None:
        """Drop every part and all host memory. The store stays open: it is its owner's."""
        self._ahead.end()
        for name in self.resident():
            self.drop(name)
        self._staging = None
        self._supply.close(self._lane)
        self._lane = None

    def _skeleton(self, name: str) -> Skeleton:
        if name not in self._skeletons:
            if name not in self._parts:
                raise KeyError(f"no part {name!r}; the parts are {', '.join(self._parts)}")
            with self._meter.aside():
                self._skeletons[name] = Skeleton(self._parts[name])
        return self._skeletons[name]


def _blocks_of(module: nn.Module) -> frozenset[int]:
    """The places of its tensors' memory."""
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors_of(module))
