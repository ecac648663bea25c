"""Whether this machine can use Triton's kernels, as far as can be told without a device."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

SWITCH = "LOWVRAM_TRITON"
"""Environment variable: `0` never uses these kernels."""


def not_offered() -> str | None:
    """Why no kernel in Triton will be used, in words for the plan; None if one may be. Triton
    builds what launches a kernel with a C compiler, when the first one runs. A machine without a
    driver plans for another, which is taken to have what torch for CUDA brings."""
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


def _driver() -> bool:
    return any(map(os.path.exists, _DRIVERS)) or shutil.which("nvidia-smi") is not None


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _headers() -> bool:
    """Looked for where Triton does: Debian's own scheme names a folder that nothing is in."""
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)
    return (Path(paths["include"]) / "Python.h").exists()
