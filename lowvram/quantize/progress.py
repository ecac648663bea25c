"""What the work tells while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """`layer` counts the finished ones; errors are those of the last one; seconds are a guess."""

    stage: Literal["copy", "calibrate", "layer", "finish", "verify"]
    layer: int
    layers: int
    error_before: float | None = None
    error_after: float | None = None
    seconds_left: float | None = None


OnProgress = Callable[[Progress], None]
Note = Callable[[str], None]


def silent(_: object) -> None:
    """Nobody is listening."""
