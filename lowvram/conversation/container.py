"""Films and recordings opened with PyAV, with what a stranger's file may do kept small."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from lowvram.conversation.source import Source
from lowvram.errors import MediaError

_FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,gif,ivf,matroska,mov,mp3,mp4,mpeg,mpegts,mxf,"
    "nut,ogg,opus,rm,tta,voc,w64,wav,webm,wtv,wv"
)
"""Formats that hold their own sound and pictures. FFmpeg also reads playlists and scripts, which
name other files and addresses."""
_SLACK_SECONDS = 1.0
"""A Matroska file may end this much before the length in its header."""


@dataclass(frozen=True)
class Timeline:
    """When the frames of one track are shown, in its own ticks.

    `count` frames last `ticks` together; `times` are their starts, first to last, where the file
    was read through to learn them.
    """

    count: int
    ticks: int
    times: tuple[int, ...] = ()


@contextlib.contextmanager
def open_container(source: Source) -> Iterator[Any]:
    """An `av.container.InputContainer`; anything FFmpeg says about it becomes one line.

    Raises:
        MediaError: it cannot be opened, or, from inside the `with`, cannot be decoded.
    """
    import av

    target = source.open() if source.path is None else f"file:{source.path}"
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    try:
        with av.open(target, options=options, metadata_errors="replace") as container:
            yield container
    except av.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise MediaError(
            f"{source.label}: cannot be decoded ({reason}); it is damaged, cut short, or neither "
            "sound nor video that is read"
        ) from error


def sound_stream(container: Any, label: str) -> Any | None:
    """The first sound track that can be decoded; None where the file has no sound track at all.

    Raises:
        MediaError: there is sound, and none of it can be decoded.
    """
    tracks = container.streams.audio
    usable = [track for track in tracks if track.codec_context is not None]
    if tracks and not usable:
        raise MediaError(
            f"{label}: its sound is in a format that is not decoded; convert it to AAC or WAV, or "
            "switch the sound of videos off"
        )
    return usable[0] if usable else None


def picture_stream(container: Any, label: str) -> Any:
    """The first track of moving pictures; cover art and thumbnails are none.

    Raises:
        MediaError: there is none, or it cannot be decoded.
    """
    from av.stream import Disposition

    still = Disposition.attached_pic | Disposition.timed_thumbnails
    tracks = [track for track in container.streams.video if not track.disposition & still]
    if not tracks:
        raise MediaError(f"{label}: has no video track; give a recording as audio")
    usable = [track for track in tracks if track.codec_context is not None]
    if not usable:
        raise MediaError(
            f"{label}: its video is in a format that is not decoded; convert it to H.264"
        )
    return usable[0]


def index_timeline(container: Any, track: Any, source: Source) -> Timeline | None:
    """A track's frames counted in the index of an MP4 or MOV file.

    None for other files, and for frames that do not come at even steps: the index has them in the
    order of decoding, so that only reading the file tells when they are shown.

    Raises:
        MediaError: the index names bytes beyond the end of the file.
    """
    if not _is_indexed(container, track):
        return None
    for stream in container.streams:
        if any(entry.pos + entry.size > source.size for entry in stream.index_entries):
            raise _cut_short(source.label)
    entries = list(track.index_entries)
    steps = {b.timestamp - a.timestamp for a, b in pairwise(entries)}
    if len(steps) > 1:
        return None
    return Timeline(sum(not entry.is_discard for entry in entries), track.duration)


def read_timeline(container: Any, track: Any, source: Source) -> Timeline:
    """A track's frames counted by reading the file through, without decoding.

    Leaves `container` at its end. Raises MediaError where the file ends before its header says.
    """
    indexed = index_timeline(container, track, source)
    shown: dict[int, int] = {}
    end = Fraction(0)
    for packet in container.demux():
        time = packet.dts if packet.pts is None else packet.pts
        if not packet.size or time is None:
            continue
        end = max(end, (time + (packet.duration or 0)) * packet.time_base)
        if packet.stream_index == track.index and not packet.is_discard:
            shown[time] = packet.duration or 0
    times = tuple(sorted(shown))
    if indexed is not None:
        if len(times) < indexed.count:
            raise _cut_short(source.label)
        return Timeline(indexed.count, indexed.ticks, times)
    if "matroska" in container.format.name and container.duration:
        missing = Fraction(container.duration, 1_000_000) - end
        if missing > _SLACK_SECONDS:
            raise _cut_short(source.label)
    return Timeline(len(times), _span(times, shown), times)


def _is_indexed(container: Any, track: Any) -> bool:
    """Whether the whole index came with the header (not so in fragmented files)."""
    return (
        "mp4" in container.format.name
        and 0 < track.frames == len(track.index_entries)
        and bool(track.duration)
    )


def _span(times: tuple[int, ...], durations: dict[int, int]) -> int:
    """Ticks from the first frame's start to the last one's end."""
    if not times:
        return 0
    last = durations[times[-1]]
    if not last and len(times) > 1:
        last = round((times[-1] - times[0]) / (len(times) - 1))
    return times[-1] - times[0] + last


def _cut_short(label: str) -> MediaError:
    return MediaError(f"{label}: cut short, its end is missing; get the file again")
