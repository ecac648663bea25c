"""Whether this machine can use Triton's kernels, and the device that is open in this process, if
one is. No torch: it is there once a device was opened, and only then asked."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

SWITCH = "LOWVRAM_TRITON"
"""Environment variable: `0` never uses these kernels."""


CAPABILITY = (8, 0)
"""Of the oldest GPUs that Triton, and products in bfloat16, are made for."""


def not_offered(dtype: str) -> str | None:
    """Why no kernel in Triton will be used for activations of that type (`bfloat16`), in words for
    the plan; None if one may be. On a device that is open a small product is tried, once."""
    refused = lacking() or too_old()
    if refused is not None or open_cuda() is None:
        return refused
    trial = importlib.import_module(f"{__package__.rpartition('.')[0]}.kernels.triton")
    try:
        found: str | None = trial.small_trial(dtype)
    except RuntimeError:
        return None  # there is no room to try: a plan goes by what is known
    return found


def too_old() -> str | None:
    """Why the open GPU, if there is one, is not one of those that the kernels are for."""
    cuda = open_cuda()
    if cuda is None or (found := cuda.get_device_capability()) >= CAPABILITY:
        return None
    return "they need compute capability {}.{}, not {}.{}".format(*CAPABILITY, *found)


def open_cuda() -> Any | None:
    """`torch.cuda`, if a GPU was opened in this process."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def lacking() -> str | None:
    """What this machine lacks to run kernels in Triton; None if nothing is known. Triton builds
    what launches a kernel with a C compiler, when the first one runs. A machine without a driver
    plans for another, which is taken to have what torch for CUDA brings."""
    if os.environ.get(SWITCH, "") == "0":
        return f"{SWITCH}=0"
    if not _driver():
        return None
    if not _installed():
        return "triton is not installed (it comes with torch for CUDA on Linux)"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler for triton (CC, gcc or clang)"
    if not _headers():
        return "the C headers of Python, which triton builds with, are missing (python3-dev)"
    return None


_DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/dxg")
"""Where Linux shows one: on a server or desktop, in a container, on Jetson, under Windows."""


@cache
def _driver() -> bool:
    return any(map(os.path.exists, _DRIVERS)) or shutil.which("nvidia-smi") is not None


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _headers() -> bool:
    """Looked for where Triton does: Debian's own scheme names a folder that nothing is in."""
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)
    return (Path(paths["include"]) / "Python.h").exists()
