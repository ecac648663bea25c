"""A part built without memory: where its tensors hang, what the file calls them, the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lowvram.errors import CheckpointError

from .header import shown
from .part import Part
from .store import Store, torch_dtype

FillFrom = Callable[[Callable[[int, int], torch.Tensor], torch.device], None]
"""`fill_from(rows, device)` of a module; see `Part`."""


@dataclass(frozen=True)
class Slot:
    """One parameter or buffer to fill: where it hangs, and what of the checkpoint it holds."""

    owner: nn.Module
    local: str
    stored: str
    first_row: int
    """Row of the stored tensor that it begins with."""
    stop_row: int | None
    """None: it holds the stored tensor whole."""
    empty: torch.Tensor
    """On meta, in the shape and type it will have."""
    is_parameter: bool

    @property
    def filled_by_owner(self) -> bool:
        """Whether the module makes something else of the stored rows, see `Part`."""
        return getattr(self.owner, "fills", None) == self.local

    @property
    def first_element(self) -> int:
        """Element of the stored tensor that it begins with."""
        return self.first_row * self.empty[0].numel() if self.first_row else 0

    def put(self, tensor: torch.Tensor) -> None:
        """Hang `tensor` in this place."""
        if self.is_parameter:
            self.owner._parameters[self.local] = nn.Parameter(tensor, requires_grad=False)
        else:
            self.owner._buffers[self.local] = tensor

    @property
    def tensor(self) -> torch.Tensor:
        """What hangs there now."""
        found: torch.Tensor = getattr(self.owner, self.local)
        return found


class Skeleton:
    """A built part without memory, and how to get back there."""

    def __init__(self, part: Part) -> None:
        with torch.device("meta"), _NoInitialValues():
            self.module = part.build().eval().requires_grad_(False)
        self.units = tuple(part.units(self.module))
        self.slots = [s for path, m in self.module.named_modules() for s in _slots(part, path, m)]
        self._at_rest = [(m, dict(m._parameters), dict(m._buffers)) for m in self.module.modules()]

    @property
    def nbytes(self) -> int:
        return sum(slot.empty.nbytes for slot in self.slots)

    def unit_slots(self, index: int) -> list[Slot]:
        """The slots of one unit, in named order."""
        inside = set(self.units[index].modules())
        return [slot for slot in self.slots if slot.owner in inside]

    def outside(self, units: Iterable[int]) -> list[nn.Module]:
        """The part's modules without those of the units with these indices."""
        away = {module for index in units for module in self.units[index].modules()}
        return [module for module in self.module.modules() if module not in away]

    def strip(self) -> None:
        """Every parameter and buffer as it was built, on meta; `as_built()` tells the modules."""
        for module, parameters, buffers in self._at_rest:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        for module, _, _ in self._at_rest:
            as_built = getattr(module, "as_built", None)
            if as_built is not None:
                as_built()


class _NoInitialValues(TorchFunctionMode):
    """Leaves out what constructors draw, for which torch would import a second's worth of code."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _slots(part: Part, path: str, module: nn.Module) -> Iterator[Slot]:
    pinned = getattr(module, "stored_dtypes", {})
    rows: tuple[str, int, int] | None = getattr(module, "stored_rows", None)
    prefix = f"{part.prefix}{path}." if path else part.prefix
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for local, tensor in named:
        if local in module._non_persistent_buffers_set:
            raise ValueError(
                f"{prefix}{local} is a buffer that no checkpoint holds; compute it when it is used"
            )
        dtype = pinned.get(local, part.dtype if tensor.is_floating_point() else tensor.dtype)
        empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
        is_parameter = local in module._parameters
        if rows is not None and local == "weight":
            name, first, stop = rows
            yield Slot(module, local, part.prefix + name, first, stop, empty, is_parameter)
        else:
            yield Slot(module, local, prefix + local, 0, None, empty, is_parameter)


def check_stored(store: Store, slot: Slot) -> None:
    """`CheckpointError` unless the store has what the slot wants, in a type that converts."""
    info = store.info(slot.stored)
    wanted = tuple(slot.empty.shape)
    if slot.stop_row is None:
        fits = info.shape == wanted
        rows = ""
    else:
        rows = f" for its rows {slot.first_row} to {slot.stop_row}"
        fits = (
            len(info.shape) == len(wanted)
            and info.shape[1:] == wanted[1:]
            and slot.stop_row <= info.shape[0]
            and slot.stop_row - slot.first_row == wanted[0]
        )
    if not fits:
        raise CheckpointError(
            f"{info.file}: {shown(info.name)} has shape {list(info.shape)}; the model wants "
            f"{list(wanted)}{rows}"
        )
    stored, dtype = torch_dtype(info), slot.empty.dtype
    if stored != dtype and not (stored.is_floating_point and dtype.is_floating_point):
        raise CheckpointError(
            f"{info.file}: {shown(info.name)} has type {info.dtype}; the model wants "
            f"{str(dtype).removeprefix('torch.')}"
        )


def place_in_files(store: Store, slot: Slot) -> tuple[str, int]:
    """Sorts slots into the order in which their bytes lie in the files."""
    info = store.info(slot.stored)
    row = info.nbytes // info.shape[0] if slot.first_row else 0
    return str(info.file), info.offset + slot.first_row * row
