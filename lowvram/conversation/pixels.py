"""From pixels to patches: sizes, and the values the vision tower reads.

The size rule and the order of values in a patch are those published with Qwen2-VL
(`Qwen2VLImageProcessorPil` in transformers, Apache-2.0); the tests compare with it bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lowvram.config import VisionConfig
from lowvram.errors import CheckpointError, MediaError

MAX_ASPECT = 200
"""The longest side over the shortest; beyond it Qwen's own tools refuse an image too."""
IMAGE_PIXELS = (56 * 56, 28 * 28 * 16384)
"""Fewest and most pixels of an image (preprocessor_config.json of Qwen2.5-Omni-7B)."""
VIDEO_PIXELS = (128 * 28 * 28, 768 * 28 * 28)
"""Fewest and most pixels of a video frame (`Qwen2_5OmniProcessor` in transformers)."""
VIDEO_TOKENS = int(128_000 * 0.9)
"""Tokens that one video may take (`VIDEO_TOTAL_PIXELS` of qwen-omni-utils, in tokens)."""
BICUBIC = 3
"""The one resampling filter that is read in `preprocessor_config.json`, by Pillow's number."""


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size an image is resized to: near its own, sides divisible by `factor`, within bounds.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"one side is more than {MAX_ASPECT} times the other")
    rounded = round(height / factor) * factor, round(width / factor) * factor
    if rounded[0] * rounded[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if rounded[0] * rounded[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return (
            math.ceil(height * grow / factor) * factor,
            math.ceil(width * grow / factor) * factor,
        )
    return rounded


@dataclass(frozen=True)
class PixelFormat:
    """How an image becomes patches: what `preprocessor_config.json` and `config.json` say."""

    patch: int = 14
    merge: int = 2
    frames: int = 2
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    scale: float = 1 / 255
    image_pixels: tuple[int, int] = IMAGE_PIXELS

    @classmethod
    def read(cls, raw: Mapping[str, Any] | None, vision: VisionConfig) -> PixelFormat:
        """From `preprocessor_config.json` (None: the published values), for that vision tower.

        Raises:
            CheckpointError: the two files disagree, or ask for another way of resizing.
        """
        raw = raw or {}
        sizes = {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "resample": BICUBIC,
        }
        for name, wanted in sizes.items():
            if raw.get(name, wanted) != wanted:
                raise CheckpointError(
                    f"preprocessor_config.json has {name} {raw[name]}; wanted {wanted}: take the "
                    "file from the same checkpoint"
                )
        size = raw.get("size") or {}
        lowest = raw.get("min_pixels") or size.get("shortest_edge") or IMAGE_PIXELS[0]
        highest = raw.get("max_pixels") or size.get("longest_edge") or IMAGE_PIXELS[1]
        return cls(
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            frames=vision.temporal_patch_size,
            mean=tuple(raw.get("image_mean") or cls.mean),
            std=tuple(raw.get("image_std") or cls.std),
            scale=raw.get("rescale_factor") or cls.scale,
            image_pixels=(lowest, highest),
        )

    @property
    def factor(self) -> int:
        """Sides of a resized image are multiples of this many pixels: one token's side."""
        return self.patch * self.merge

    def fit(self, label: str, size: tuple[int, int], bounds: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) an image of `size` is resized to, its area within `bounds`."""
        try:
            return smart_resize(*size, self.factor, *bounds)
        except ValueError as error:
            height, width = size
            raise MediaError(
                f"{label}: {width} x {height} pixels, and {error}; crop it or pad it first"
            ) from error

    def video_bounds(self, bounds: tuple[int, int], frames: int) -> tuple[int, int]:
        """Bounds of one frame's area where all frames share the published total."""
        lowest, highest = bounds
        share = VIDEO_TOKENS * self.factor**2 * self.frames // frames
        return lowest, min(highest, max(share, int(lowest * 1.05)))

    def grid(self, height: int, width: int, frames: int) -> tuple[int, int, int]:
        """Patches in (time, height, width) of resized frames; an odd last frame counts as two."""
        return -(-frames // self.frames), height // self.patch, width // self.patch

    @cached_property
    def table(self) -> np.ndarray:
        """The normalised value of every 8-bit value, float32 [3, 256]."""
        values = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        mean, std = (np.array(v, np.float32)[:, None] for v in (self.mean, self.std))
        return (values - mean) / std

    def patches(self, frames: np.ndarray, pair: int) -> np.ndarray:
        """One step of time as flattened patches.

        `frames`: uint8 [n, H, W, 3]. Returns float32 [h * w, channels * frames * patch * patch], in
        the order of the 2 x 2 groups that become one token. A frame beyond the last is the last.
        """
        _, height, width, channels = frames.shape
        groups = height // self.factor, width // self.factor
        out = np.empty(
            (*groups, self.merge, self.merge, channels, self.frames, self.patch, self.patch),
            np.float32,
        )
        for k in range(self.frames):
            frame = frames[min(pair * self.frames + k, len(frames) - 1)]
            blocks = frame.reshape(groups[0], self.merge, self.patch, groups[1], self.merge, -1, 3)
            ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5)
            for channel in range(channels):
                out[..., channel, k, :, :] = self.table[channel][ordered[..., channel, :, :]]
        return out.reshape(groups[0] * groups[1] * self.merge**2, -1)
