"""Keeping what is dropped from staying in the process, where the C library is glibc.

glibc maps a large block apart, and unmaps it when it is freed; but each block freed so raises the
size from which it does that (up to 32 MiB), and what is smaller then lies in the heap, where one
small block on top keeps all below it. Weights dropped from there were never given back.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_M_MMAP_THRESHOLD = -3  # malloc.h

APART_FROM = 128 << 10
"""Bytes from which blocks are mapped apart inside `apart`: glibc's own first threshold."""

OTHERWISE_FROM = 32 << 20
"""And outside, the most that glibc allows: activations that come and go by the hundred are far
quicker in the heap (a third of the vocoder's time)."""

_inside = 0
_lock = threading.Lock()


@contextmanager
def apart() -> Iterator[None]:
    """Inside, every block that holds a weight of some size can be given back by itself."""
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def _enter(step: int) -> None:
    global _inside
    library = _glibc()
    if library is None:
        return
    with _lock:
        _inside += step
        library.mallopt(_M_MMAP_THRESHOLD, APART_FROM if _inside else OTHERWISE_FROM)


def trim() -> None:
    """Give free pages of the heap back to the system."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    """The C library, if it is glibc."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version.restype = ctypes.c_char_p
        library.gnu_get_libc_version()
        library.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (AttributeError, OSError, TypeError):
        return None
    return library
