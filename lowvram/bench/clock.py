"""How long things take, and how fast memory can be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

FEWEST, MOST = 5, 100
"""Runs of a measured piece of work."""

SUMS = 10
SUM_BYTES = 2**30
"""The streaming sums by which read bandwidth is measured: how many, and over how much."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: the median of several, and the best."""

    median: float
    best: float


def interleave(works: Sequence[Callable[[], object]], seconds: float) -> list[Timing]:
    """Run each once unmeasured, then all in turns, so that what disturbs one disturbs all, for
    about `seconds` each, within `FEWEST` and `MOST` turns."""
    for work in works:
        work()
    taken: list[list[float]] = [[] for _ in works]
    spent = 0.0
    while len(taken[0]) < FEWEST or (spent < seconds * len(works) and len(taken[0]) < MOST):
        for work, times in zip(works, taken, strict=True):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
            spent += times[-1]
    return [Timing(median(times), min(times)) for times in taken]


def read_bandwidth(nbytes: int = SUM_BYTES) -> float:
    """Bytes a second: the best of `SUMS` sums over a buffer larger than any cache."""
    buffer = torch.ones(nbytes // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(SUMS):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best
