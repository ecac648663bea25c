"""Telling an exhausted device from every other failure."""

from __future__ import annotations

import torch

# What torch's host allocator says, and oneDNN when it gets no memory; both are RuntimeErrors.
_SAID = ("DefaultCPUAllocator", "could not create a primitive")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed for want of memory, on an accelerator or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)
