"""Compiles the simulated device once for this torch and these sources; later runs find it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCES = Path(__file__).parent / "csrc"
CACHE = Path(__file__).resolve().parents[2] / "build" / "simdevice"
FLAGS = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-w",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
)
LIBRARIES = ("-lc10", "-ltorch_cpu")


def library() -> Path:
    """The compiled device; it is built first where it is not there. Raises `RuntimeError` with the
    compiler's words if it does not compile."""
    target = CACHE / f"{_key()}.so"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with _locked(CACHE / "lock"):
            if not target.exists():
                _build(target)
    return target


def _key() -> str:
    digest = hashlib.sha256(f"{torch.__version__} {FLAGS} {_compiler()}".encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError("no C++ compiler (tried $CXX, c++, g++, clang++); install g++ or clang")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        includes = [f"-isystem{path}" for path in include_paths()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pairs = zip(sources, objects, strict=True)
            list(
                pool.map(
                    lambda pair: _run(*FLAGS, *includes, "-c", str(pair[0]), "-o", str(pair[1])),
                    pairs,
                )
            )
        made = Path(folder) / target.name
        found = [f"-L{path}" for path in library_paths()]
        _run("-shared", *map(str, objects), *found, *LIBRARIES, "-o", str(made))
        made.rename(target)


def _run(*arguments: str) -> None:
    done = subprocess.run([_compiler(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the simulated device does not compile:\n{done.stderr[-4000:]}")
