"""Counts the memory of tensors while they live, on devices that keep no statistics of their own.

Every operation passes through a dispatch mode; a storage that comes out of one and went into none
is new, and counts until the last tensor over it is gone. Views, in-place results and storages made
before do not count. What a kernel allocates and frees inside itself is not seen.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_KERNEL_KEYS = {"cpu": torch._C.DispatchKey.CPU, "meta": torch._C.DispatchKey.Meta}


class _Gone(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage that knows which one it was."""

    __slots__ = ("key",)
    key: int


class StorageLedger(TorchDispatchMode):
    """Bytes in storages made on one type of device ("cpu" or "meta") while the mode is on.

    `grown` is called after every rise of `live_bytes`. Sizes are those of the storages, without
    an allocator's rounding.
    """

    def __init__(self, device_type: str, grown: Callable[[], None]) -> None:
        super().__init__()
        self.live_bytes = 0
        self.paused = False
        """While true, operations pass uncounted."""
        self._type = device_type
        self._grown = grown
        self._live: dict[int, tuple[int, _Gone]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch imports its whole compiler, a second of work, at the first operation. Nothing
        # is compiled while this mode is on.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if _is_composite(func, self._type):
            # Under inference mode such an operation arrives whole; its parts allocate.
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        out = func(*args, **kwargs)
        for tensor in _tensors((out,)):
            if tensor.device.type == self._type:
                self._see(tensor, args, kwargs)
        return out

    def _see(self, tensor: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is None:
            given = (*_tensors(args), *_tensors(kwargs.values()))
            if any(t.untyped_storage()._cdata == key for t in given):
                return
            gone = _Gone(storage, self._forget)
            gone.key = key
            before = 0
        else:
            before, gone = known
        if known is None or before != nbytes:  # new, or resized in place
            self._live[key] = (nbytes, gone)
            self.live_bytes += nbytes - before
            self._grown()

    def _forget(self, gone: weakref.ref[torch.UntypedStorage]) -> None:
        assert isinstance(gone, _Gone)
        self._drop(gone.key)

    def _drop(self, key: int) -> None:
        nbytes, _ = self._live.pop(key, (0, None))
        self.live_bytes -= nbytes

    def disown(self, tensors: Iterable[torch.Tensor]) -> None:
        """Stop counting the storages of `tensors`: somebody else answers for them from now on."""
        for tensor in tensors:
            self._drop(tensor.untyped_storage()._cdata)


@functools.cache
def _is_composite(func: Any, device_type: str) -> bool:
    return func.has_kernel_for_dispatch_key(_COMPOSITE) and not func.has_kernel_for_dispatch_key(
        _KERNEL_KEYS[device_type]
    )


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided:  # others have no storage to speak of
                yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
