"""What says that memory ran out, and what only speaks of memory."""

from __future__ import annotations

import pytest
import torch

from lowvram.offload import out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("anything"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("could not create a primitive"),
        RuntimeError("NPU out of memory. NPUWorkspaceAllocator tried to allocate 2.00 MiB"),
        RuntimeError("CUDA error: out of memory"),
    ],
    ids=str,
)
def test_memory_ran_out(error: BaseException) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Unsupported memory format"),
        ValueError("out of memory"),
    ],
    ids=str,
)
def test_something_else_failed(error: BaseException) -> None:
    assert not out_of_memory(error)
