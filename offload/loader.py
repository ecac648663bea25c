"""Modules on demand: built once without memory, filled from the store, dropped without a copy.

The file is the home of the weights and the device a cache: nothing is ever copied back.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lowvram.errors import CheckpointError

from .device import Device
from .header import shown
from .meter import Meter
from .part import Part
from .placement import Placement
from .staging import Staging
from .store import Store, torch_dtype
from .stream import UnitStream


@dataclass(frozen=True)
class _Slot:
    """One parameter or buffer to fill: where it hangs, and its name in the checkpoint."""

    owner: nn.Module
    local: str
    stored: str
    empty: torch.Tensor  # on meta, in the type it will have
    is_parameter: bool


class _NoInitialValues(TorchFunctionMode):
    """Leaves out what constructors draw, for which torch would import a second's worth of code."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


class _Skeleton:
    """A built part without memory, and how to get back there."""

    def __init__(self, part: Part) -> None:
        with torch.device("meta"), _NoInitialValues():
            self.module = part.build().eval().requires_grad_(False)
        self.slots = [s for path, m in self.module.named_modules() for s in _slots(part, path, m)]
        self._at_rest = [(m, dict(m._parameters), dict(m._buffers)) for m in self.module.modules()]

    @property
    def nbytes(self) -> int:
        return sum(slot.empty.nbytes for slot in self.slots)

    def strip(self) -> None:
        """Every parameter and buffer as it was built, on meta."""
        for module, parameters, buffers in self._at_rest:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)


def _slots(part: Part, path: str, module: nn.Module) -> Iterator[_Slot]:
    pinned = getattr(module, "stored_dtypes", {})
    prefix = f"{part.prefix}{path}." if path else part.prefix
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for local, tensor in named:
        if local in module._non_persistent_buffers_set:
            raise ValueError(
                f"{prefix}{local} is a buffer that no checkpoint holds; compute it when it is used"
            )
        dtype = pinned.get(local, part.dtype if tensor.is_floating_point() else tensor.dtype)
        empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
        yield _Slot(module, local, prefix + local, empty, local in module._parameters)


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
        self._skeletons: dict[str, _Skeleton] = {}
        self._resident: dict[str, nn.Module] = {}
        self._staging: Staging | None = None
        self.bytes_host_to_device = 0
        """Bytes of weights written to the device by loads; on `cpu`, read into place."""
        if store is None and device.type != "meta":
            raise ValueError(f"a loader on {device.name} needs a store to load from")

    def load(self, name: str, placement: Placement | None = None) -> nn.Module:
        """The part, on the device. Nothing is done if it is there already.

        Raises `CheckpointError` if the store lacks one of its tensors or holds it in another shape
        or kind of number, and lets the allocator's error through. Nothing of it stays then.
        """
        if name in self._resident:
            return self._resident[name]
        skeleton = self._skeleton(name)
        if self._store is not None:
            for slot in skeleton.slots:
                _check(self._store, slot)
        # Plain tensors even in a caller's inference mode, so that they may be replaced outside it.
        with torch.inference_mode(False), torch.no_grad():
            try:
                self._fill(name, skeleton)
            except BaseException as error:
                self._device.synchronize()  # no copy may run into memory that is given back
                # The frames below would keep what they had allocated alive.
                traceback.clear_frames(error.__traceback__)
                self._free(name)
                raise
        self._resident[name] = skeleton.module
        return skeleton.module

    def _fill(self, name: str, skeleton: _Skeleton) -> None:
        for slot in skeleton.slots:
            shape, dtype = slot.empty.shape, slot.empty.dtype
            filled = torch.empty(shape, dtype=dtype, device=self._device.torch)
            if slot.is_parameter:
                slot.owner._parameters[slot.local] = nn.Parameter(filled, requires_grad=False)
            else:
                slot.owner._buffers[slot.local] = filled
        held = skeleton.nbytes
        self._meter.hold("weights", name, held, _tensors(skeleton.module))
        if self._store is not None and self._device.type != "meta":
            self._read(self._store, skeleton)
        for module in skeleton.module.modules():
            hook = getattr(module, "after_load", None)
            if hook is not None:
                before = _nbytes(module)
                hook()
                held += _nbytes(module) - before
                self._meter.hold("weights", name, held, _tensors(module))

    def _read(self, store: Store, skeleton: _Skeleton) -> None:
        """Fill the part's tensors in the order they lie in the files."""
        lane = self._device.copy_lane() if self._staging is None else None
        if lane is not None:
            self._staging = Staging(store, lane)
        staging = self._staging
        if staging is not None:
            staging.begin()
        read = store.read_into if staging is None else staging.fill
        for slot in sorted(skeleton.slots, key=lambda s: _place(store, s)):
            out: torch.Tensor = getattr(slot.owner, slot.local)
            read(slot.stored, out)
            self.bytes_host_to_device += out.nbytes
        if staging is not None:
            staging.finish()

    def drop(self, name: str) -> None:
        """Free the part's memory; the module stays, on meta. Nothing happens if it is not there."""
        if self._resident.pop(name, None) is None:
            return
        self._free(name)

    def _free(self, name: str) -> None:
        self._skeletons[name].strip()
        self._meter.release("weights", name)
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
        return UnitStream(self._parts[name].units(self._resident[name]))

    def nbytes(self, name: str) -> int:
        """Bytes the part's tensors take on the device as they are stored; loads nothing."""
        return self._skeleton(name).nbytes

    def is_resident(self, name: str) -> bool:
        return name in self._resident

    def resident(self) -> tuple[str, ...]:
        """The parts on the device, in the order they were loaded."""
        return tuple(self._resident)

    def close(self) -> None:
        """Drop every part and the staging buffers. The store stays open: it is its owner's."""
        for name in self.resident():
            self.drop(name)
        self._staging = None

    def _skeleton(self, name: str) -> _Skeleton:
        if name not in self._skeletons:
            if name not in self._parts:
                raise KeyError(f"no part {name!r}; the parts are {', '.join(self._parts)}")
            with self._meter.aside():
                self._skeletons[name] = _Skeleton(self._parts[name])
        return self._skeletons[name]


def _check(store: Store, slot: _Slot) -> None:
    info = store.info(slot.stored)
    if info.shape != tuple(slot.empty.shape):
        raise CheckpointError(
            f"{info.file}: {shown(info.name)} has shape {list(info.shape)}; the model wants "
            f"{list(slot.empty.shape)}"
        )
    stored, wanted = torch_dtype(info), slot.empty.dtype
    if stored != wanted and not (stored.is_floating_point and wanted.is_floating_point):
        raise CheckpointError(
            f"{info.file}: {shown(info.name)} has type {info.dtype}; the model wants "
            f"{str(wanted).removeprefix('torch.')}"
        )


def _place(store: Store, slot: _Slot) -> tuple[str, int]:
    info = store.info(slot.stored)
    return str(info.file), info.offset


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _nbytes(module: nn.Module) -> int:
    """Bytes of the distinct storages of a module and what is below it."""
    storages = (tensor.untyped_storage() for tensor in _tensors(module))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
