"""What a caller may set about media. The command line takes its defaults from here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowvram.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class MediaSettings:
    """How media become tokens.

    `fps`: frames a second taken from a video (2, as in training); for a video given as frames, the
    rate at which they were taken. `max_frames`: at most so many frames of one video, spread evenly.
    `min_pixels`, `max_pixels`: bounds of an image's, or of a video frame's, size after resizing;
    None leaves the published bounds of each kind. `audio_in_video`: hear the sound of videos.
    """

    fps: float = 2.0
    max_frames: int = 768
    min_pixels: int | None = None
    max_pixels: int | None = None
    audio_in_video: bool = True

    def __post_init__(self) -> None:
        if not (_is_number(self.fps) and self.fps > 0 and math.isfinite(self.fps)):
            raise UsageError(f"fps is {self.fps!r}; wanted a number above 0 (2 is the default)")
        _require_count("max_frames", self.max_frames, 2)
        for name in ("min_pixels", "max_pixels"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name), 1)
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise UsageError(
                f"min_pixels is {self.min_pixels} and max_pixels {self.max_pixels}; "
                "wanted min_pixels at most max_pixels"
            )

    def override(self, values: Mapping[str, Any]) -> MediaSettings:
        """These settings with some replaced, as a content item may do for itself."""
        return dataclasses.replace(self, **values)

    def pixel_range(self, lowest: int, highest: int) -> tuple[int, int]:
        """Bounds in pixels, given the kind's own; a bound that is set moves one that is not."""
        if self.min_pixels is None and self.max_pixels is None:
            return lowest, highest
        if self.min_pixels is None:
            assert self.max_pixels is not None
            return min(lowest, self.max_pixels), self.max_pixels
        if self.max_pixels is None:
            return self.min_pixels, max(highest, self.min_pixels)
        return self.min_pixels, self.max_pixels


ITEM_SETTINGS = ("fps", "max_frames", "min_pixels", "max_pixels")
"""Settings that a content item of the conversation may carry for itself (the model card's way)."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} is {value!r}; wanted a whole number, {least} or more")
