"""Which phase of generation the current thread is in. Kernels are chosen by it, never by rows.

A prompt that is cut into smaller chunks, or whose last chunk is short, must give the same numbers:
so the row count of one call must not choose the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Phase = Literal["prefill", "decode"]

_phase: ContextVar[Phase] = ContextVar("lowvram_kernel_phase", default="prefill")


@contextmanager
def kernel_phase(phase: Phase) -> Iterator[None]:
    """Inside the block, linears use the kernel of `phase`."""
    before = _phase.get()
    _phase.set(phase)
    try:
        yield
    finally:
        _phase.set(before)


def current_phase() -> Phase:
    """The phase set by the nearest `kernel_phase`; prefill outside of any."""
    return _phase.get()
