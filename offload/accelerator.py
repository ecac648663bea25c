"""Devices with memory of their own: one class for every back end that mirrors `torch.cuda`.

Bytes are what the driver would say of this process: the context, and all that the allocator has
taken from the driver, in use or kept for reuse.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import device as TorchDevice
from torch import dtype as TorchDtype

from lowvram.errors import DeviceError

from . import probe
from .budget import MIB
from .lane import CopyLane, StreamLane

FALLBACK_CONTEXT_BYTES = 640 * MIB
"""Taken for a context that could not be measured; published sizes are 0.2 to 0.6 GiB."""

_CREDIBLE_CONTEXT = range(32 * MIB, 2048 * MIB)  # outside, another process moved while we measured


def cuda_backend() -> Any:
    """`torch.cuda`, or a `DeviceError` that says what is missing."""
    if torch.cuda.is_available():
        return torch.cuda
    if torch.version.cuda is None and torch.version.hip is None:
        raise DeviceError(
            f"no CUDA device can be used: torch {torch.__version__} is a build without CUDA; "
            "install one with CUDA (pytorch.org, Get Started), or use the device cpu"
        )
    raise DeviceError(
        "no CUDA device can be used: torch sees none; check the driver with nvidia-smi, or use the "
        "device cpu"
    )


def npu_backend() -> Any:
    """`torch.npu`, after importing torch_npu, or a `DeviceError` that says what is missing."""
    if not probe.npu_installed():
        raise DeviceError(
            "no npu can be used: torch_npu is not installed; install a CPU build of torch and then "
            "lowvram-omni[npu] in an environment of its own, or use the device cpu"
        )
    try:
        importlib.import_module("torch_npu")
        backend = torch.get_device_module("npu")
        usable = backend.is_available()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DeviceError(
            f"no npu can be used: torch_npu does not load ({reason[0][:160]}); install the CANN "
            "toolkit of its version and source its set_env.sh, or use the device cpu"
        ) from error
    if not usable:
        raise DeviceError(
            "no npu can be used: torch_npu sees none; check the driver with npu-smi, or use the "
            "device cpu"
        )
    # Nothing is compiled anew for every length of a prompt, and weights keep the format they have:
    # the 4-bit product takes no other. Chips of the first kind default to the opposite.
    backend.set_compile_mode(jit_compile=False)
    backend.config.allow_internal_format = False
    return backend


def _matrix_product(device: TorchDevice, dtype: TorchDtype) -> None:
    x = torch.ones(64, 64, dtype=dtype, device=device)
    x @ x


def _cuda_libraries(device: TorchDevice, dtype: TorchDtype) -> None:
    """Matrix products, and the convolutions of the vocoder: what cuBLAS and cuDNN load is then part
    of the context that is measured, and not a surprise after it."""
    _matrix_product(device, dtype)
    if dtype == torch.float32:
        shapes = (1, 8, 64), (8, 8, 4)
        signal, weight = (torch.ones(shape, dtype=dtype, device=device) for shape in shapes)
        # Without cuDNN there is no speech, but the rest can still be used.
        with contextlib.suppress(RuntimeError):
            torch.nn.functional.conv1d(signal, weight)
            torch.nn.functional.conv_transpose1d(signal, weight, stride=2)


def _cuda_driver_free(backend: Any, index: int) -> int | None:
    uuid = getattr(backend.get_device_properties(index), "uuid", None)
    return probe.cuda_free_bytes(f"GPU-{uuid}") if uuid is not None else None


@dataclass(frozen=True)
class Accelerator:
    """What differs between the kinds of accelerator."""

    kind: str
    has_bfloat16: Callable[[Any], bool]
    """Whether the device of this back end computes bfloat16 itself, rather than emulating it."""
    driver_free: Callable[[Any, int], int | None]
    """Free bytes according to the driver's own tool, which needs no context of ours."""
    warm_up: Callable[[TorchDevice, TorchDtype], None] = _matrix_product
    """Makes the driver load what every model needs."""


ACCELERATORS = {
    "cuda": Accelerator(
        "cuda",
        lambda b: bool(b.is_bf16_supported(including_emulation=False)),
        _cuda_driver_free,
        _cuda_libraries,
    ),
    # npu-smi prints a table for people, in MB of the whole card: too coarse to tell a context.
    "npu": Accelerator("npu", lambda b: bool(b.is_bf16_supported()), lambda backend, index: None),
}


class AcceleratorDevice:
    """A device with memory of its own. `backend` is `torch.cuda`, `torch.npu` or one like them.

    Opening it makes it the current device and creates the driver's context, so that its size is
    known before anything is planned.
    """

    def __init__(self, spec: Accelerator, index: int, backend: Any) -> None:
        self.type = spec.kind
        self.name = f"{spec.kind}:{index}"
        self.torch = TorchDevice(spec.kind, index)
        self._spec, self._index, self._backend = spec, index, backend
        self._context = self._open()

    def _open(self) -> int:
        """Create the context; its size is the fall of the free memory while it comes up.

        A context that this process had before cannot be told apart from other processes' memory.
        """
        b, i = self._backend, self._index
        before = None if b.is_initialized() else self._spec.driver_free(b, i)
        b.set_device(i)
        wide = torch.bfloat16 if self.has_bfloat16() else torch.float16
        for dtype in (torch.float32, wide):
            self._spec.warm_up(self.torch, dtype)
        b.synchronize(i)
        after = None if before is None else self._spec.driver_free(b, i)
        if before is None or after is None:
            return FALLBACK_CONTEXT_BYTES
        taken = before - after - int(b.memory_reserved(i))
        return taken if taken in _CREDIBLE_CONTEXT else FALLBACK_CONTEXT_BYTES

    def total_bytes(self) -> int:
        return int(self._backend.mem_get_info(self._index)[1])

    def free_bytes(self) -> int:
        free, total = self._backend.mem_get_info(self._index)
        own = self._context + int(self._backend.memory_reserved(self._index))
        return min(int(total), int(free) + own)

    def context_bytes(self) -> int:
        return self._context

    def allocated_bytes(self) -> int:
        return int(self._backend.memory_allocated(self._index))

    def peak_bytes(self) -> int:
        return self._context + int(self._backend.max_memory_reserved(self._index))

    def reset_peak(self) -> None:
        self._backend.reset_peak_memory_stats(self._index)

    def synchronize(self) -> None:
        self._backend.synchronize(self._index)

    def empty_cache(self) -> None:
        self._backend.empty_cache()

    def set_limit(self, nbytes: int | None) -> None:
        total = self.total_bytes()
        share = 1.0 if nbytes is None else (nbytes - self._context) / total
        share = min(1.0, max(0.0, share))  # the allocator knows nothing of the context
        self._backend.set_per_process_memory_fraction(share, self._index)

    def copy_lane(self) -> CopyLane | None:
        return StreamLane(self.torch)

    def has_bfloat16(self) -> bool:
        return self._spec.has_bfloat16(self._backend)
