"""Building the kernels with the user's compiler on first use, and keeping the result for him.

A library in the cache is code that will run: the folder has to be the user's own, and writable by
nobody else, or nothing is taken from it. A digest at its end tells whether it is whole; what is not
(of a disk that was full, or a machine that lost its power) is built again.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
# Hidden, for what is shared by name would be one thing in libraries for several kinds.
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden")
_SECONDS, _VERSION_SECONDS = 120, 20
"""That building may take, and telling a version."""

_DIGEST = hashlib.sha256


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
        said = failed.read_text(encoding="utf-8", errors="replace")
        return None if switch == "1" else said or None
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
        # A cache that is there may be one that can only be read.
        if not _is_whole(library):
            library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _alone(library.with_suffix(".lock")):
                if not _is_whole(library):
                    _build(command, kind, library, failed)
        _check(library.parent)
        _check(library)
    except OSError as error:
        raise NotBuilt(f"the cache cannot be used: {error}") from error
    return library


def compiler() -> tuple[str, ...] | None:
    """The command of the user's C++ compiler; None without one, or if `CXX` names none."""
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError:  # a quotation without an end
        return None
    for name, *options in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        found = shutil.which(name)
        if found:
            return found, *options
    return None


def _places(command: tuple[str, ...], kind: Processor) -> tuple[Path, Path]:
    """Where the library lies, and what is left of a failure to build it.

    Raises:
        NotBuilt: the compiler does not tell its version, or the user has no home.
    """
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # As the convention has it, a place relative to wherever one is does not count.
        home = chosen if chosen.is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise NotBuilt(f"there is no place to keep them: {error}; set XDG_CACHE_HOME") from error
    name = f"{kind.name.lower()}-{_digest(command, kind)}"
    folder = home / "lowvram-omni-native"
    return folder / f"{name}.so", folder / f"{name}.failed"


@cache
def _digest(command: tuple[str, ...], kind: Processor) -> str:
    """Of all that makes one library another: sources, flags and compiler."""
    version = _version(command)
    if version is None:
        raise NotBuilt(f"{command[0]} does not tell its version")
    digest = _DIGEST(repr((command, version, _FLAGS, kind.flags)).encode())
    for source in sorted([*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


@cache
def _version(command: tuple[str, ...]) -> str | None:
    """What the compiler says of itself; None if it fails or takes too long. Asked once."""
    done, said = _run([*command, "--version"], _VERSION_SECONDS)
    return said if done else None


def _build(command: tuple[str, ...], kind: Processor, library: Path, failed: Path) -> None:
    """Compile beside the place, and move there what is whole."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        options = [*_FLAGS, *kind.flags, str(_SOURCES / _MAIN), "-o", str(made)]
        done, said = _run([*command, *options], _SECONDS)
        if done and made.exists():
            _seal(made)
            made.replace(library)
            failed.unlink(missing_ok=True)
            return
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    line = next((line for line in lines if "error" in line.lower()), [*lines, "no output"][0])
    why = f"{Path(command[0]).name} could not build them: {line[:160]}; {SWITCH}=1 tries again"
    failed.write_text(why, encoding="utf-8")
    raise NotBuilt(why)


def _run(command: list[str], seconds: float) -> tuple[bool, str]:
    """Whether a command succeeds within that time, and what it says then, or else of its failure.
    Nothing of it is left running."""
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                said, complained = process.communicate(timeout=seconds)
            except BaseException:
                # A compiler is a driver and the programs that it starts.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
    except subprocess.TimeoutExpired:
        return False, f"not done after {seconds:g} s"
    except OSError as error:
        return False, str(error)
    return (True, said) if process.returncode == 0 else (False, complained)


def _seal(library: Path) -> None:
    """Append the digest of what is there, for the user alone, on the disk."""
    library.chmod(0o700)
    with library.open("r+b") as file:
        file.write(_DIGEST(file.read()).digest())
        file.flush()
        os.fsync(file.fileno())


def _is_whole(library: Path) -> bool:
    """Whether all that was built is there."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    size = _DIGEST().digest_size
    return _DIGEST(content[:-size]).digest() == content[-size:]


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
