"""Prompts that are planned before their media exist: lengths in place of files.

A second of video is one frame pair of 54 x 56 patches (756 tokens), the largest frame of the usual
shape, and 25 tokens of sound; a picture is one such frame. Text is counted by whoever asks, or
bounded by its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from lowvram.config import ThinkerConfig
from lowvram.conversation.messages import Message, Text
from lowvram.conversation.pixels import VIDEO_PIXELS, PixelFormat
from lowvram.conversation.positions import HeardVideo, Picture, Run, Span, positions
from lowvram.conversation.prompt import MediaShape, PromptShape
from lowvram.conversation.settings import MediaSettings
from lowvram.conversation.tokens import HOP, SAMPLE_RATE, audio_tokens, grid_tokens
from lowvram.conversation.video import frames_taken
from lowvram.errors import UsageError

FRAME = (756, 784)
"""Height and width of an imagined frame in pixels: 54 x 56 patches, or 756 tokens."""

_FILMED = 30  # frames a second

_TEMPLATE_TOKENS = 16
"""What a chat template writes around a message, at most."""


def imagined_media(
    config: ThinkerConfig,
    settings: MediaSettings,
    *,
    video_seconds: float | None = None,
    audio_seconds: float | None = None,
    images: int = 0,
) -> list[MediaShape]:
    """The shapes of pictures, a recording and a video of these lengths.

    Raises:
        UsageError: a length that is not above 0, or too short for a frame.
    """
    pixels = PixelFormat.read(None, config.vision)
    shapes = []
    if images < 0:
        raise UsageError(f"--images is {images}; wanted 0 or more")
    bounds = settings.pixel_range(*pixels.image_pixels)
    for _ in range(images):
        grid = pixels.grid(*pixels.fit("--images", FRAME, bounds), 1)
        shapes.append(MediaShape("image", grid))
    if audio_seconds is not None:
        shapes.append(MediaShape("audio", audio_frames=_frames("--audio-seconds", audio_seconds)))
    if video_seconds is not None:
        heard = _frames("--video-seconds", video_seconds)
        total = max(1, round(video_seconds * _FILMED))
        taken = frames_taken(total, Fraction(_FILMED), settings)
        limits = pixels.video_bounds(settings.pixel_range(*VIDEO_PIXELS), taken)
        grid = pixels.grid(*pixels.fit("--video-seconds", FRAME, limits), taken)
        sound = heard if settings.audio_in_video else None
        shapes.append(MediaShape("video", grid, sound, video_seconds / grid[0]))
    return shapes


def shape_of(shapes: Sequence[MediaShape], text_tokens: int, config: ThinkerConfig) -> PromptShape:
    """The prompt of media and so many tokens of text."""
    merge = config.vision.spatial_merge_size
    spans: list[Span] = [Run(text_tokens)]
    tokens = text_tokens
    for shape in shapes:
        heard = 0 if shape.audio_frames is None else audio_tokens(shape.audio_frames)
        tokens += heard + (grid_tokens(shape.grid, merge) if shape.grid else 0)
        if shape.grid is None:
            spans.append(Run(heard))
        elif shape.audio_frames is None:
            spans.append(Picture(shape.grid, shape.seconds_per_grid))
        else:
            spans.append(HeardVideo(shape.grid, shape.seconds_per_grid, heard))
    place = positions(spans, config)
    return PromptShape(
        tokens=tokens,
        next_position=int(place.max()) + 1 if place.size else 0,
        grids=tuple(shape.grid for shape in shapes if shape.grid is not None),
        audio_frames=tuple(s.audio_frames for s in shapes if s.audio_frames is not None),
    )


def most_tokens(messages: Sequence[Message]) -> int:
    """As many tokens as the text can be: one for each byte, and what the template writes."""
    parts = (part for message in messages for part in message.parts)
    texts = (len(part.text.encode()) for part in parts if isinstance(part, Text))
    return sum(texts) + _TEMPLATE_TOKENS * (len(messages) + 1)


def _frames(flag: str, seconds: float) -> int:
    """Mel frames of so many seconds of sound."""
    if not (seconds > 0 and math.isfinite(seconds)):
        raise UsageError(f"{flag} is {seconds}; wanted above 0")
    return -(-round(seconds * SAMPLE_RATE) // HOP)
