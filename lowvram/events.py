"""What a request yields while it runs, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from lowvram.report import Report

SAMPLE_RATE = 24_000
"""Samples a second of every waveform that leaves the package."""


@dataclass(frozen=True)
class TextDelta:
    """The next piece of the reply's text: whole characters, never half of one."""

    text: str


@dataclass(frozen=True)
class AudioChunk:
    """The next piece of speech.

    `samples` is float32 mono in [-1, 1]; `start_s` is the second of the reply at which it begins;
    `codes` are the codec tokens whose sound ends in this piece.
    """

    samples: np.ndarray
    sample_rate: int
    start_s: float
    codes: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """The whole reply: text, speech (float32 mono at 24 kHz, or None) and what it took."""

    text: str
    audio: np.ndarray | None
    report: Report
    tokens: tuple[int, ...] = ()
    codes: tuple[int, ...] = ()
    sample_rate: int = SAMPLE_RATE


@dataclass(frozen=True)
class Finished:
    """The last event; `result` is the same object that `generate` returns."""

    result: Result


Event = TextDelta | AudioChunk | Finished
