"""Telling an exhausted device from every other failure."""

from __future__ import annotations

import torch

# What torch's host allocator says, oneDNN when it gets no memory, and drivers and libraries of
# accelerators beside torch's allocator; torch_npu's own has no class for it in every release.
_SAID = ("DefaultCPUAllocator", "could not create a primitive", "out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed for want of memory, on an accelerator or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)
