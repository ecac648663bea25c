"""Frames of a failed call, which keep alive what they had allocated as long as the error lives."""

from __future__ import annotations

import traceback


def clear_frames(error: BaseException) -> None:
    """Empty the finished frames behind an error, and behind those that led to it."""
    behind: BaseException | None = error
    while behind is not None:
        traceback.clear_frames(behind.__traceback__)
        behind = behind.__cause__ or behind.__context__
