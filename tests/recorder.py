"""Recording and replaying on any device, operation by operation, as a CUDA graph does it: on the
addresses and with the numbers of the recording."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TapeRecorder:
    """Stands in for `CudaRecorder`; counts recordings, and replays of each. Between two replays
    everything that the tape made itself is overwritten: nothing of it may be relied on."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def record(self, body: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        tape = _Tape()
        with tape:
            result = body()
        tape.spoil()
        number = len(self.replays)
        self.replays.append(0)

        def replay() -> None:
            self.replays[number] += 1
            tape.spoil()
            tape.play()

        return result, replay


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._own: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and _storage(made) not in given:
                self._own[_storage(made)] = made
        self._calls.append((func, args, kwargs, result))
        return result

    def spoil(self) -> None:
        for made in self._own.values():
            made.fill_(torch.nan if made.is_floating_point() else 1)

    def play(self) -> None:
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and _storage(old) != _storage(new):
                    old.copy_(new)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
