"""Host memory for weights in pages of 2 MiB, of which a processor looks up far fewer."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

from torch import Tensor

HUGE = 2 << 20
_MADV_HUGEPAGE = 14
"""Of Linux, include/uapi/asm-generic/mman-common.h."""


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for them where nothing has been written yet; returns the tensor.

    Only whole huge pages inside the tensor are asked for, so that no byte more is taken than it
    has. A system without them, or one that is set to `never`, goes on as it is.
    """
    if tensor.device.type == "cpu" and sys.platform == "linux":
        start, length = inside(tensor.data_ptr(), tensor.nbytes)
        if length:
            _libc().madvise(start, length, _MADV_HUGEPAGE)
    return tensor


def inside(start: int, nbytes: int) -> tuple[int, int]:
    """Where the whole huge pages among `nbytes` from address `start` begin, and their length."""
    first = -(-start // HUGE) * HUGE
    return first, max((start + nbytes) // HUGE * HUGE - first, 0)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
