"""Videos: which frames are taken, and the frames themselves, resized while they are decoded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeGuard

import numpy as np

from lowvram.conversation.container import (
    Timeline,
    index_timeline,
    open_container,
    picture_stream,
    read_timeline,
)
from lowvram.conversation.image import MAX_PIXELS, image_size, load_image
from lowvram.conversation.pixels import BICUBIC, VIDEO_PIXELS, PixelFormat
from lowvram.conversation.settings import MediaSettings
from lowvram.conversation.source import Source, locate
from lowvram.errors import MediaError

FRAME_FACTOR = 2
MIN_FRAMES = 4
"""Frames taken are a multiple of 2, and 4 or more where there are as many (qwen-omni-utils)."""
_SLACK_SECONDS = 0.5
"""A decoder may stop this much before the last frame named in the file; that one is then shown."""


@dataclass(frozen=True)
class Sampling:
    """Which frames are taken from a video, and what they become.

    `frames` of `total`, each resized to (height, width) = `size`; `seconds_per_grid` is the time
    from one pair of frames to the next, `temporal_patch_size / sampled frames per second`.
    """

    label: str
    total: int
    frames: int
    size: tuple[int, int]
    seconds_per_grid: float


def sample_video(value: object, settings: MediaSettings, pixels: PixelFormat) -> Sampling:
    """What `load_video` takes, from headers, and one decoded frame to know which side is up.

    Raises:
        MediaError: see `load_video`.
    """
    if is_frames(value):
        return _sample_frames(value, settings, pixels)
    source = locate(value)
    timeline = _timeline(source, read=False)
    return _sample_file(source, timeline, settings, pixels)


def load_video(
    value: object, settings: MediaSettings, pixels: PixelFormat
) -> tuple[Sampling, np.ndarray]:
    """The frames of a video, uint8 [n, height, width, 3], resized as images are.

    `value`: path, URL, bytes, an array [n, height, width, 3], or a list of images; of the last two,
    `settings.fps` is the rate at which the frames were taken. Frames are picked evenly from the
    first to the last by the time at which they are shown; only those picked are kept.

    Raises:
        MediaError: it cannot be found or decoded, is cut short, has no video track, or no frames.
    """
    if is_frames(value):
        sampling = _sample_frames(value, settings, pixels)
        picked = pick(tuple(range(sampling.total)), sampling.frames)
        pictures = (load_image(value[i])[1] for i in picked)
        return sampling, _stack(pictures, sampling)
    source = locate(value)
    timeline = _timeline(source, read=True)
    sampling = _sample_file(source, timeline, settings, pixels)
    times = [timeline.times[i] for i in pick(timeline.times, sampling.frames)]
    with open_container(source) as container:
        return sampling, _stack(_pictures_at(container, times, source.label), sampling)


def is_frames(value: object) -> TypeGuard[Sequence[Any] | np.ndarray]:
    """Whether a video was given as its frames."""
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def frames_taken(total: int, rate: Fraction, settings: MediaSettings) -> int:
    """How many of `total` frames at `rate` a second are taken.

    The rule of `smart_nframes` in qwen-omni-utils; a single frame, which it refuses, is taken.
    """
    most = min(settings.max_frames, total)
    wanted = max(math.floor(total / rate * Fraction(settings.fps)), MIN_FRAMES)
    return max(1, min(wanted, most) // FRAME_FACTOR * FRAME_FACTOR)


def pick(times: tuple[int, ...], count: int) -> list[int]:
    """Indices of `count` frames, evenly spread in time from the first to the last."""
    targets = np.linspace(times[0], times[-1], count)
    places = np.interp(targets, times, np.arange(len(times)))
    return [int(i) for i in np.rint(places.round(6))]


def _timeline(source: Source, *, read: bool) -> Timeline:
    """When the frames are shown; with `read`, the time of each."""
    with open_container(source) as container:
        track = picture_stream(container, source.label)
        indexed = None if read else index_timeline(container, track, source)
        return indexed or read_timeline(container, track, source)


def _sample_file(
    source: Source, timeline: Timeline, settings: MediaSettings, pixels: PixelFormat
) -> Sampling:
    with open_container(source) as container:
        track = picture_stream(container, source.label)
        width, height = track.codec_context.width, track.codec_context.height
        if width * height > MAX_PIXELS:
            raise MediaError(
                f"{source.label}: {width} x {height} pixels a frame, which is not safe to unpack; "
                "make it smaller first"
            )
        first = next(container.decode(track), None) if timeline.count else None
        if first is None:
            raise MediaError(f"{source.label}: has no frames; get the video again")
        size = (first.width, first.height) if _turns(first) % 2 else (first.height, first.width)
        rate = _rate(track, timeline)
    taken = frames_taken(timeline.count, rate, settings)
    return _sampling(source.label, timeline.count, taken, size, rate, settings, pixels)


def _sampling(
    label: str,
    total: int,
    taken: int,
    size: tuple[int, int],
    rate: Fraction,
    settings: MediaSettings,
    pixels: PixelFormat,
) -> Sampling:
    bounds = pixels.video_bounds(settings.pixel_range(*VIDEO_PIXELS), taken)
    return Sampling(
        label=label,
        total=total,
        frames=taken,
        size=pixels.fit(label, size, bounds),
        seconds_per_grid=float(pixels.frames * total / (taken * rate)),
    )


def _rate(track: Any, timeline: Timeline) -> Fraction:
    """Frames a second: as the header says where the frames bear it out, else their mean."""
    seconds = timeline.ticks * Fraction(track.time_base)
    if track.average_rate:
        stated = Fraction(track.average_rate)
        if not seconds or abs(timeline.count / stated - seconds) * stated <= 1:
            return stated
    return timeline.count / seconds if seconds else Fraction(1)


def _pictures_at(container: Any, times: list[int], label: str) -> Iterator[Any]:
    """The pictures shown at `times` (ascending), each the first that is shown then or later."""
    track = picture_stream(container, label)
    track.thread_type = "AUTO"
    left = len(times)
    last = None
    for frame in container.decode(track):
        last = frame
        if frame.pts is None or frame.pts < times[-left]:
            continue
        picture = _upright(frame)
        while left and frame.pts >= times[-left]:
            yield picture
            left -= 1
        if not left:
            return
    behind = None if last is None or last.pts is None else times[-1] - last.pts
    if behind is None or behind * track.time_base > _SLACK_SECONDS:
        raise MediaError(
            f"{label}: its last {left} of {len(times)} frames cannot be decoded; get the "
            "video again"
        )
    yield from [_upright(last)] * left


def _upright(frame: Any) -> Any:
    """A decoded frame as a PIL image, turned as the camera was held."""
    from PIL import Image

    turned = np.rot90(frame.to_ndarray(format="rgb24"), _turns(frame))
    return Image.fromarray(np.ascontiguousarray(turned))


def _turns(frame: Any) -> int:
    """Quarter turns to the left that set a frame upright."""
    return round(frame.rotation / 90)


def _sample_frames(value: Any, settings: MediaSettings, pixels: PixelFormat) -> Sampling:
    total = len(value)
    if total == 0:
        raise MediaError("the video given has no frames; wanted at least one")
    if isinstance(value, np.ndarray) and value.ndim != 4:
        raise MediaError(
            f"the video given is an array of shape {list(value.shape)}; wanted [frames, height, "
            "width, 3]"
        )
    sizes = {image_size(frame)[1] for frame in value}
    if len(sizes) > 1:
        raise MediaError(
            f"the frames of the video given have {len(sizes)} different sizes; wanted one"
        )
    rate = Fraction(settings.fps)
    taken = total
    if total > settings.max_frames:
        taken = settings.max_frames // FRAME_FACTOR * FRAME_FACTOR
    return _sampling("the video given", total, taken, sizes.pop(), rate, settings, pixels)


def _stack(pictures: Iterator[Any], sampling: Sampling) -> np.ndarray:
    height, width = sampling.size
    out = np.empty((sampling.frames, height, width, 3), np.uint8)
    for i, picture in enumerate(pictures):
        out[i] = np.asarray(picture.resize((width, height), BICUBIC))
    return out
