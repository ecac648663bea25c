"""Which of the sources' two ways this processor can go."""

from __future__ import annotations

import platform
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

_FEATURES = Path("/proc/cpuinfo")


class Processor(NamedTuple):
    """A kind of processor: what the system must say that it has, and how to compile for it."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")

AVX2 = Processor("AVX2", frozenset({"avx2", "fma", "f16c"}), _AVX2)

AVX512 = Processor(
    "AVX512-BF16",
    AVX2.needs | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
    (
        *_AVX2,
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512bf16",
        "-DLOWVRAM_AVX512",
    ),
)


@cache
def processor() -> Processor | None:
    """The better of the two that this one is; None for others, and where nothing tells."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    try:
        text = _FEATURES.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return best_of(text)


def best_of(text: str) -> Processor | None:
    """The better of the two that every processor of a `/proc/cpuinfo` is."""
    lines = [line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")]
    if not lines:
        return None
    has = frozenset.intersection(*(frozenset(line.split()) for line in lines))
    return next((kind for kind in (AVX512, AVX2) if kind.needs <= has), None)
