"""Recordings of any format, rate and number of channels, as 16 kHz mono.

Sound is decoded as it is stored, its channels are averaged, and only then is it resampled: FFmpeg's
own conversion to mono is 3 dB louder and can clip.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowvram.conversation.container import (
    index_timeline,
    open_container,
    read_timeline,
    sound_stream,
)
from lowvram.conversation.riff import check_whole
from lowvram.conversation.source import Source, locate
from lowvram.conversation.tokens import SAMPLE_RATE, audio_tokens, mel_frames, resampled
from lowvram.conversation.video import is_frames
from lowvram.errors import MediaError

MAX_SECONDS = 4 * 3600
"""Longer recordings are refused; a window of 32,768 positions ends after 22 minutes of sound."""
_BLOCK_VALUES = 1 << 18
_PLAIN_MAGIC = (b"riff", b"rifx", b"rf64", b"flac", b"oggs", b"form", b"caff", b".snd")
"""How WAV, W64, RF64, FLAC, Ogg, AIFF, CAF and AU files begin, in small letters."""
_MAX_CHANNELS = 64
_NUMBERS = ("float16", "float32", "float64", "int16", "int32", "uint8")
"""Arrays whose full scale is beyond doubt."""


@dataclass(frozen=True)
class Sound:
    """A recording being decoded: mono blocks, float32, at `rate`; `samples` where that is known."""

    label: str
    rate: int
    blocks: Iterator[np.ndarray]
    samples: int | None = None


def load_audio(value: object) -> np.ndarray:
    """A recording as float32 [n] at 16 kHz, mono.

    `value`: path, URL, bytes, an array, or a pair (array, samples a second). Arrays are [n] or
    [n, channels] (or [channels, n]), float in [-1, 1] or integers, 16 kHz unless a rate is given.

    Raises:
        MediaError: it cannot be found or decoded, is cut short, or lasts under 30 ms or over 4 h.
    """
    with open_sound(value) as sound:
        waveform = resample(sound)
    _check_length(sound.label, len(waveform))
    return waveform


def audio_frames(value: object) -> int:
    """The mel frames of `load_audio(value)`, from the header where it tells, else by decoding."""
    with open_sound(value) as sound:
        samples = _count(sound)
    _check_length(sound.label, samples)
    return mel_frames(samples)


def load_sound_track(value: object) -> np.ndarray | None:
    """The sound of a film as `load_audio` gives it; None where there is none worth a token."""
    if is_frames(value):
        return None
    source = locate(value)
    with open_container(source) as container:
        track = sound_stream(container, source.label)
        if track is None:
            return None
        waveform = resample(decode_track(container, track, source.label))
    return waveform if audio_tokens(mel_frames(len(waveform))) else None


def sound_track_frames(value: object) -> int | None:
    """The mel frames of `load_sound_track(value)`, by decoding the sound alone."""
    if is_frames(value):
        return None
    source = locate(value)
    with open_container(source) as container:
        track = sound_stream(container, source.label)
        if track is None:
            return None
        frames = mel_frames(_count(decode_track(container, track, source.label)))
    return frames if audio_tokens(frames) else None


@contextlib.contextmanager
def open_sound(value: object) -> Iterator[Sound]:
    """A recording's samples, block by block."""
    if isinstance(value, np.ndarray | tuple):
        yield _from_array(value)
        return
    source = locate(value)
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(_plain(source) or _contained(source))


def decode_track(container: Any, track: Any, label: str) -> Sound:
    """A sound track of an open container, averaged over its channels, in its own rate."""
    frames = container.decode(track)
    first = next(frames, None)
    if first is None:
        return Sound(label, SAMPLE_RATE, iter(()), samples=0)
    frames = itertools.chain([first], frames)
    return Sound(label, first.sample_rate, _track_blocks(frames, first.sample_rate, label))


def _track_blocks(frames: Iterator[Any], rate: int, label: str) -> Iterator[np.ndarray]:
    for frame in frames:
        if frame.sample_rate != rate:
            raise MediaError(
                f"{label}: its sample rate changes from {rate} to {frame.sample_rate}; convert it "
                "to one rate first"
            )
        yield _average(_frame_values(frame), label)


def resample(sound: Sound) -> np.ndarray:
    """All of it as one waveform at 16 kHz; the same as resampling it in one piece."""
    if sound.rate == SAMPLE_RATE:
        pieces = list(_limited(sound))
    else:
        import soxr

        stream = soxr.ResampleStream(sound.rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        pieces = [stream.resample_chunk(block) for block in _limited(sound)]
        pieces.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def _count(sound: Sound) -> int:
    """How many samples `resample` would give."""
    samples = sound.samples
    if samples is None:
        samples = sum(len(block) for block in _limited(sound))
    return resampled(samples, sound.rate)


def _limited(sound: Sound) -> Iterator[np.ndarray]:
    seen = 0
    for block in sound.blocks:
        seen += len(block)
        if seen > MAX_SECONDS * sound.rate:
            raise _too_long(sound.label)
        yield block


def _too_long(label: str) -> MediaError:
    return MediaError(
        f"{label}: longer than the {MAX_SECONDS // 3600} hours that are read; cut it into parts"
    )


def _check_length(label: str, samples: int) -> None:
    if samples == 0:
        raise MediaError(f"{label}: holds no sound (0 samples); record it again")
    if not audio_tokens(mel_frames(samples)):
        raise MediaError(
            f"{label}: {samples / SAMPLE_RATE * 1000:.0f} ms of sound; wanted at least 30 ms"
        )


@contextlib.contextmanager
def _contained(source: Source) -> Iterator[Sound]:
    """What FFmpeg decodes: every compressed format, and the sound of films."""
    with open_container(source) as container:
        track = sound_stream(container, source.label)
        if track is None:
            raise MediaError(
                f"{source.label}: has no sound track; give a film with sound, or a recording"
            )
        if index_timeline(container, track, source) is None:
            with open_container(source) as again:
                read_timeline(again, sound_stream(again, source.label), source)
        yield decode_track(container, track, source.label)


def _plain(source: Source) -> contextlib.AbstractContextManager[Sound] | None:
    """What libsndfile knows to the sample; None for anything else."""
    import soundfile

    with source.open() as file:
        if not file.read(4).lower().startswith(_PLAIN_MAGIC):
            return None
    target = source.open() if source.path is None else str(source.path)
    try:
        return _plain_sound(source, soundfile.SoundFile(target))
    except soundfile.SoundFileError:
        return None


@contextlib.contextmanager
def _plain_sound(source: Source, file: Any) -> Iterator[Sound]:
    with file:
        check_whole(source)
        if file.frames > MAX_SECONDS * file.samplerate:
            raise _too_long(source.label)
        yield Sound(
            source.label, file.samplerate, _plain_blocks(file, source.label), samples=file.frames
        )


def _plain_blocks(file: Any, label: str) -> Iterator[np.ndarray]:
    import soundfile

    size = max(1, _BLOCK_VALUES // file.channels)
    done = 0
    try:
        while len(block := file.read(size, dtype="float32", always_2d=True)):
            done += len(block)
            yield _average(block, label)
    except soundfile.SoundFileError as error:
        raise MediaError(
            f"{label}: cannot be decoded ({error}); get the recording again"
        ) from error
    if done < file.frames:
        raise MediaError(
            f"{label}: cut short, {done} of {file.frames} samples are there; get the recording "
            "again"
        )


def _average(values: np.ndarray, label: str) -> np.ndarray:
    """Channels averaged: float32 [n, channels] -> [n]."""
    mono = values[:, 0] if values.shape[1] == 1 else values.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise MediaError(f"{label}: holds samples that are not numbers; export it again")
    return np.ascontiguousarray(mono)


def _frame_values(frame: Any) -> np.ndarray:
    """A decoded `av.AudioFrame` as float32 [n, channels] in [-1, 1]."""
    values = frame.to_ndarray()
    if frame.format.is_planar:
        return _to_float(np.ascontiguousarray(values.T))
    return _to_float(values.reshape(-1, len(frame.layout.channels)))


def _to_float(values: np.ndarray) -> np.ndarray:
    """Samples of any number type as float32, full scale to 1."""
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128) / np.float32(128)
    return values.astype(np.float32) / np.float32(2.0 ** (8 * values.itemsize - 1))


def _from_array(value: np.ndarray | tuple[Any, ...]) -> Sound:
    """An array, or (array, samples a second)."""
    label = "the recording given"
    array, rate = (value, SAMPLE_RATE) if isinstance(value, np.ndarray) else _unpack(value, label)
    if array.dtype.name not in _NUMBERS or array.ndim not in (1, 2):
        raise MediaError(
            f"{label} is a {array.ndim}-dimensional array of {array.dtype}; wanted "
            f"{', '.join(_NUMBERS)} of shape [samples] or [samples, channels]"
        )
    table = array[:, None] if array.ndim == 1 else array
    if 0 < table.shape[0] < table.shape[1]:
        table = table.T
    if not 1 <= table.shape[1] <= _MAX_CHANNELS:
        raise MediaError(
            f"{label} is an array of shape {list(array.shape)}; wanted [samples] or [samples, "
            "channels]"
        )
    if len(table) > MAX_SECONDS * rate:
        raise _too_long(label)
    mono = _average(_to_float(table), label)
    return Sound(label, rate, iter([mono]), samples=len(mono))


def _unpack(value: tuple[Any, ...], label: str) -> tuple[np.ndarray, int]:
    if len(value) == 2 and isinstance(value[1], int | float | np.integer | np.floating):
        array = np.asarray(value[0])
        if value[1] >= 1 and int(value[1]) == value[1]:
            return array, int(value[1])
    raise MediaError(f"{label} is a tuple; wanted (array, samples a second)")
