"""Telling an exhausted device from every other failure."""

from __future__ import annotations

import torch

# What torch's host allocator says; it raises a plain RuntimeError.
_HOST_ALLOCATOR = "DefaultCPUAllocator"


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed for want of memory, on an accelerator or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _HOST_ALLOCATOR in str(error)
