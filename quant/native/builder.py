"""Building the kernels with the user's compiler on first use, and keeping the result for him.

A library in the cache is code that will run: the folder has to be the user's own, and writable by
nobody else, or nothing is taken from it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from .processors import Processor, processor

LEAST_WEIGHTS = 1 << 18
"""Weights of the smallest linear that is worth a compiler. The 3B's smallest has twice as many, the
built-in model's largest half as many: its first answer must not wait for a build."""

SWITCH = "LOWVRAM_NATIVE"
"""Environment variable: `0` never uses the compiled kernels, `1` also where they gain little, and
builds again what has failed to build before."""

_SOURCES = Path(__file__).parent
_MAIN = "kernels.cpp"
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC")
_SECONDS = 120


class NotBuilt(Exception):
    """There is no library; the message says why, in words for the plan."""


def not_offered(weights: int) -> str | None:
    """Why a linear of so many weights will not be computed by the compiled kernels, as far as can
    be told without building them; None if it will."""
    switch = os.environ.get(SWITCH, "")
    if switch == "0":
        return f"{SWITCH}=0"
    if weights < LEAST_WEIGHTS and switch != "1":
        return f"a linear of {weights:,} weights gains too little"
    kind = processor()
    if kind is None:
        return "they are for Linux on x86-64 with AVX2 or AVX512-BF16"
    command = compiler()
    if command is None:
        return "there is no C++ compiler (CXX, c++, g++ or clang++)"
    try:
        _, failed = _places(command, kind)
        _check(failed.parent)
        return None if switch == "1" else failed.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (NotBuilt, OSError) as error:
        return str(error)


def built(kind: Processor) -> Path:
    """The library for that kind of processor, built if it is not there yet. Processes that want it
    at once wait for the first of them.

    Raises:
        NotBuilt: there is no compiler, it failed, or the cache is nobody's or anybody's.
    """
    command = compiler()
    if command is None:
        raise NotBuilt("there is no C++ compiler (CXX, c++, g++ or clang++)")
    library, failed = _places(command, kind)
    try:
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(library.with_suffix(".lock")):
            if not library.exists():
                _build(command, kind, library, failed)
            _check(library)
    except OSError as error:
        raise NotBuilt(f"the cache cannot be used: {error}") from error
    return library


def compiler() -> tuple[str, ...] | None:
    """The command of the user's C++ compiler."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for name, *options in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        found = shutil.which(name)
        if found:
            return found, *options
    return None


def _places(command: tuple[str, ...], kind: Processor) -> tuple[Path, Path]:
    """Where the library lies, and what is left of a failure to build it."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    home = Path(chosen) if chosen else Path.home() / ".cache"
    name = f"{kind.name.lower()}-{_digest(command, kind)}"
    folder = home / "lowvram-omni-native"
    return folder / f"{name}.so", folder / f"{name}.failed"


@cache
def _digest(command: tuple[str, ...], kind: Processor) -> str:
    """Of all that makes one library another: sources, flags and compiler."""
    digest = hashlib.sha256(repr((command, _version(command), _FLAGS, kind.flags)).encode())
    for source in sorted([*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _version(command: tuple[str, ...]) -> str:
    try:
        run = subprocess.run(
            [*command, "--version"], capture_output=True, timeout=_SECONDS, check=True
        )
        return run.stdout.decode(errors="replace")
    except (OSError, subprocess.SubprocessError) as error:
        raise NotBuilt(f"{command[0]} does not tell its version: {error}") from error


def _build(command: tuple[str, ...], kind: Processor, library: Path, failed: Path) -> None:
    """Compile beside the place, and move there what is whole."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        options = [*_FLAGS, *kind.flags, str(_SOURCES / _MAIN), "-o", str(made)]
        try:
            run = subprocess.run(
                [*command, *options],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
            )
            said = "" if run.returncode == 0 and made.exists() else run.stderr or "no output"
        except (OSError, subprocess.SubprocessError) as error:
            said = str(error)
        if not said:
            made.chmod(0o700)
            made.replace(library)
            failed.unlink(missing_ok=True)
            return
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    line = next((line for line in lines if "error" in line.lower()), lines[0])
    why = f"{Path(command[0]).name} could not build them: {line[:160]}"
    failed.write_text(why, encoding="utf-8")
    raise NotBuilt(why)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Inside the block no other process has this lock; its folder is checked first."""
    import fcntl

    _check(lock.parent)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check(path: Path) -> None:
    """
    Raises:
        NotBuilt: another user owns `path` or can write there, or to a folder above it.
    """
    own = path.lstat()
    if own.st_uid != os.geteuid() or stat.S_ISLNK(own.st_mode) or own.st_mode & 0o022:
        raise NotBuilt(f"{path} is not the user's alone: chmod go-w it, or remove it")
    for folder in path.resolve().parents:
        mode = folder.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise NotBuilt(f"{folder} can be written by everyone; wanted a cache of the user's own")
