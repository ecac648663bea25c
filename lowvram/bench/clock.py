"""How long things take, and how fast memory can be read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

FEWEST, MOST = 3, 40
"""Runs of a measured piece of work."""

SUMS = 10
SUM_BYTES = 2**30
"""The streaming sums by which read bandwidth is measured: how many, and over how much."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: the median of several, and the best."""

    median: float
    best: float


def measure(work: Callable[[], object], seconds: float) -> Timing:
    """Run `work` once unmeasured, then for about that long, within `FEWEST` and `MOST` times."""
    work()
    taken: list[float] = []
    while len(taken) < FEWEST or (sum(taken) < seconds and len(taken) < MOST):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return Timing(median(taken), min(taken))


def read_bandwidth(nbytes: int = SUM_BYTES) -> float:
    """Bytes a second: the best of `SUMS` sums over a buffer larger than any cache."""
    buffer = torch.ones(nbytes // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(SUMS):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best
