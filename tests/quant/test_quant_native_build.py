"""Building the compiled kernels: once, whole, by nobody else, and never needed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lowvram.quant import Problem, preferred_kernel, select
from lowvram.quant.kernels import native
from lowvram.quant.native import NotBuilt, builder, built, not_offered, processor
from lowvram.quant.native.processors import AVX2, AVX512

LARGE = Problem("cpu", torch.bfloat16, 2048, 256, 128)
WEIGHTS = 2048 * 256

SCRIPT = """#!/bin/sh
case "$*" in --version) echo fake {version}; exit 0;; esac
echo built >> {log}
{body}
"""
WRITES = 'sleep 0.3; while [ "$1" != -o ]; do shift; done; echo library > "$2"'
FAILS = "echo 'In file included from x:' >&2; echo 'x.cpp:1: error: no such flag' >&2; exit 1"


class Compiler:
    """A compiler of the user's, which counts its calls, and a cache of its own."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.script, self.log, self.cache = folder / "cxx", folder / "log", folder / "cache"
        self.cache.mkdir(mode=0o755)
        patch.setenv("CXX", str(self.script))
        patch.setenv("XDG_CACHE_HOME", str(self.cache))
        patch.delenv("LOWVRAM_NATIVE", raising=False)
        self.does(WRITES)

    @property
    def folder(self) -> Path:
        return self.cache / "lowvram-omni-native"

    @property
    def calls(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def does(self, body: str, version: str = "1") -> None:
        self.script.write_text(SCRIPT.format(log=self.log, body=body, version=version))
        self.script.chmod(0o755)
        forget()


def forget() -> None:
    """As a process that begins."""
    for known in (native.library, native._loaded, builder._digest, builder._version):
        known.cache_clear()


def text(library: Path) -> str:
    """What the compiler wrote, without the digest behind it."""
    return library.read_bytes()[:-32].decode()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    monkeypatch.setattr(builder, "processor", lambda: AVX2)
    monkeypatch.setattr(native, "processor", lambda: AVX2)
    yield Compiler(tmp_path, monkeypatch)  # type: ignore[misc]
    forget()


def test_is_built_once_and_again_for_another_compiler_or_processor(compiler: Compiler) -> None:
    first = built(AVX2)
    assert text(first) == "library\n" and built(AVX2) == first and compiler.calls == 1
    assert first.parent == compiler.folder and compiler.folder.stat().st_mode & 0o777 == 0o700
    assert built(AVX512) != first and compiler.calls == 2
    compiler.does(WRITES, version="2")
    assert built(AVX2) != first and compiler.calls == 3


def test_is_built_again_for_other_sources(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = built(AVX2)
    monkeypatch.setattr(builder, "_SOURCES", tmp_path)
    for name in ("kernels.cpp", "lanes.h"):
        (tmp_path / name).write_text("// another")
        builder._digest.cache_clear()
        assert built(AVX2) != first
    assert compiler.calls == 3


def test_processes_that_want_it_at_once_build_it_once(compiler: Compiler) -> None:
    code = (
        "from lowvram.quant.native import built; from lowvram.quant.native.processors import AVX2;"
        "import sys; print(built(AVX2).read_bytes()[:7].decode(), 'torch' in sys.modules)"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [run.communicate()[0] for run in runs] == ["library False\n"] * 3
    assert compiler.calls == 1
    assert sorted(p.suffix for p in compiler.folder.iterdir()) == [".lock", ".so"]


def test_a_failing_compiler_is_told_and_not_tried_again(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.does(FAILS)
    assert preferred_kernel("cpu", "bfloat16", weights=WEIGHTS).name == "native"  # not known yet
    why = "cxx could not build them: x.cpp:1: error: no such flag; LOWVRAM_NATIVE=1 tries again"
    with pytest.warns(UserWarning, match="compiled kernels are not used: cxx could not build"):
        kernel = select(LARGE)  # the plan had counted on it
    assert kernel.name == "cpu" and kernel.reason == f"the native kernel cannot: {why}"
    planned = preferred_kernel("cpu", "bfloat16", weights=WEIGHTS)
    assert planned.name == "cpu" and planned.reason.endswith(f"are not used: {why}")
    forget()
    assert select(LARGE).name == "cpu" and compiler.calls == 1
    monkeypatch.setenv("LOWVRAM_NATIVE", "1")
    with pytest.warns(UserWarning, match="not used"):
        assert select(LARGE).name == "cpu" and compiler.calls == 2
    compiler.does(WRITES)
    assert built(AVX2).exists() and not list(compiler.folder.glob("*.failed"))
    monkeypatch.delenv("LOWVRAM_NATIVE")
    assert not_offered(WEIGHTS) is None


def test_what_is_built_but_no_library_is_not_used(compiler: Compiler) -> None:
    with pytest.warns(UserWarning, match="not used"):
        kernel = select(LARGE)
    assert kernel.name == "cpu" and "native kernel cannot" in kernel.reason


def test_without_a_compiler(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    kernel = select(LARGE)
    assert kernel.name == "cpu" and "there is no C++ compiler" in kernel.reason
    with pytest.raises(NotBuilt, match="no C"):
        built(AVX2)
    monkeypatch.setenv("CXX", 'g++ "-O1')
    assert "there is no C++ compiler" in str(not_offered(WEIGHTS))
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(compiler.cache))
    assert builder.compiler() is None


@pytest.mark.parametrize("does", ["exit 3", "sleep 30"])
def test_a_compiler_without_a_version(
    compiler: Compiler, does: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "_VERSION_SECONDS", 0.2)
    compiler.script.write_text(f"#!/bin/sh\necho asked >> {compiler.log}\n{does}\n")
    for _ in range(3):
        assert "does not tell its version" in select(LARGE).reason
    assert compiler.calls == 1, "every linear asks"


def test_a_compiler_that_hangs_is_ended_with_all_it_started(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "_SECONDS", 0.5)
    compiler.does(f"sleep 60 & echo $! > {tmp_path / 'child'}; wait")
    with pytest.raises(NotBuilt, match=r"not done after 0.5 s; LOWVRAM_NATIVE=1 tries again"):
        built(AVX2)
    child = int((tmp_path / "child").read_text())
    gone = time.monotonic() + 10
    with suppress(ProcessLookupError):
        while time.monotonic() < gone and not _zombie(child):
            os.kill(child, 0)
            time.sleep(0.01)
    assert time.monotonic() < gone
    assert "not done" in str(not_offered(WEIGHTS)) and compiler.calls == 1
    assert sorted(p.suffix for p in compiler.folder.iterdir()) == [".failed", ".lock"]


def _zombie(process: int) -> bool:
    """Whether a process has ended, and nobody has asked how."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_what_is_no_longer_whole_is_built_again(compiler: Compiler) -> None:
    library = built(AVX2)
    for spoilt in (b"", b"library", library.read_bytes()[:-1], b"L" + library.read_bytes()[1:]):
        library.write_bytes(spoilt)
        assert text(built(AVX2)) == "library\n"
    assert compiler.calls == 5


def test_a_cache_that_can_only_be_read_serves(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = built(AVX2)

    def refused(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(builder.os, "open", refused)
    monkeypatch.setattr(Path, "mkdir", refused)
    assert built(AVX2) == library
    with pytest.raises(NotBuilt, match=r"the cache cannot be used: .*Read-only"):
        built(AVX512)


def test_a_marker_of_failure_that_says_nothing(compiler: Compiler) -> None:
    library = built(AVX2)
    marker = library.with_suffix(".failed")
    marker.write_bytes(b"")
    assert not_offered(WEIGHTS) is None
    marker.write_bytes(b"caf\xe9")
    assert not_offered(WEIGHTS) == "caf\ufffd"


def test_the_place_of_the_cache(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert built(AVX2).parent == tmp_path / "home" / ".cache" / "lowvram-omni-native"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    planned = preferred_kernel("cpu", "bfloat16", weights=WEIGHTS)
    assert planned.name == "cpu" and "home directory.; set XDG_CACHE_HOME" in planned.reason
    assert select(LARGE).name == "cpu"


@pytest.mark.filterwarnings("ignore:compiled kernels are not used")
@pytest.mark.parametrize("place", ["folder", "library", "above"])
def test_what_others_can_write_is_not_run(compiler: Compiler, place: str) -> None:
    library = built(AVX2)
    before = not_offered(WEIGHTS)
    spoilt = {"folder": compiler.folder, "library": library, "above": compiler.cache}[place]
    spoilt.chmod(0o777)
    with pytest.raises(NotBuilt, match="user"):
        built(AVX2)
    assert before is None and select(LARGE).name == "cpu"
    if place != "library":  # that is looked at only when it is wanted
        assert str(spoilt) in preferred_kernel("cpu", "bfloat16", weights=WEIGHTS).reason


def test_a_link_is_not_followed(compiler: Compiler, tmp_path: Path) -> None:
    library = built(AVX2)
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(NotBuilt, match="the user's alone"):
        built(AVX2)


def test_a_cache_that_cannot_be_made(compiler: Compiler) -> None:
    compiler.cache.rmdir()
    compiler.cache.write_text("a file")
    with pytest.raises(NotBuilt, match="the cache cannot be used"):
        built(AVX2)
    assert select(LARGE).name == "cpu"


def test_the_switch(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWVRAM_NATIVE", "0")
    assert "LOWVRAM_NATIVE=0" in select(LARGE).reason and not_offered(1 << 40) is not None
    monkeypatch.setenv("LOWVRAM_NATIVE", "1")
    assert not_offered(1024) is None
    monkeypatch.setenv("LOWVRAM_NATIVE", "")
    assert not_offered(1024) is not None and not_offered(builder.LEAST_WEIGHTS) is None
    monkeypatch.setattr(builder, "processor", lambda: None)
    assert "x86-64" in str(not_offered(WEIGHTS)) and compiler.calls == 0


def test_a_torch_whose_threads_cannot_be_shared(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__file__", "/nowhere/torch/__init__.py")
    with pytest.raises(NotBuilt, match="threads"):
        native._team()


def test_this_processor_is_known_or_told_not_to_be() -> None:
    kind = processor()
    assert kind is None or kind.needs >= AVX2.needs
