"""What operations allocate, seen one operation at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Notes the bytes of every storage that an operation makes on a device: views and in-place
    results are in a storage of their inputs, and make none."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        known = {_storage(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device:
                storage = _storage(leaf)
                if storage._cdata not in known:
                    self.sizes.append(storage.nbytes())
        return result


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
