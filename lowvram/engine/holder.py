"""What holds things on the device for a part of a request, and gives them back when it is left."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from torch import Tensor

from lowvram.engine.context import Context


class Holder:
    """Used in a `with` block, at whose end everything on `_stack` is left and nothing is kept."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._stack = ExitStack()
        self._kept: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._forget()
        for key in tuple(self._kept):
            self._let_go(key)
        self._stack.__exit__(kind, error, trace)

    def _forget(self) -> None:
        """Drop what would keep tensors alive."""

    def _keep(self, key: str, tensors: Iterable[Tensor]) -> None:
        """Count those tensors that are on the device until `_let_go`, in the place of any before:
        an entry of a phase sees only what is made in it."""
        there = [t for t in tensors if t.device.type == self._context.device.type]
        sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in there}
        self._context.meter.hold("activations", key, sum(sizes.values()), there)
        self._kept.add(key)

    def _let_go(self, key: str) -> None:
        """What was kept under that key is gone, if anything was."""
        self._context.meter.release("activations", key)
        self._kept.discard(key)
