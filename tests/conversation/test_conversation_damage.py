"""Damaged files of every kind either work or fail in one line about that file, and quietly."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conversation_files import picture, tone, write_film
from PIL import Image

from lowvram.config import VisionConfig
from lowvram.conversation import MediaSettings
from lowvram.conversation.audio import audio_frames, load_audio, load_sound_track
from lowvram.conversation.image import image_size, load_image
from lowvram.conversation.pixels import PixelFormat
from lowvram.conversation.video import load_video, sample_video
from lowvram.errors import MediaError

FORMAT = PixelFormat.read(None, VisionConfig())


def films(value: Any) -> None:
    sample_video(value, MediaSettings(max_pixels=28 * 28 * 16), FORMAT)
    load_video(value, MediaSettings(max_pixels=28 * 28 * 16), FORMAT)
    load_sound_track(value)


def sounds(value: Any) -> None:
    audio_frames(value)
    load_audio(value)


def pictures(value: Any) -> None:
    image_size(value)
    load_image(value)


def picture_file(form: str) -> Callable[[Path], bytes]:
    def write(_: Path) -> bytes:
        out = io.BytesIO()
        Image.fromarray(picture(40, 60)).save(out, form)
        return out.getvalue()

    return write


def sound_file(form: str) -> Callable[[Path], bytes]:
    def write(_: Path) -> bytes:
        out = io.BytesIO()
        soundfile.write(out, tone(0.4), 16_000, format=form)
        return out.getvalue()

    return write


def film_file(name: str, **settings: Any) -> Callable[[Path], bytes]:
    def write(folder: Path) -> bytes:
        film = write_film(folder / name, frames=12, seconds=0.4, size=(48, 64), **settings)
        return film.read_bytes()

    return write


FILES: dict[str, tuple[Callable[[Any], None], Callable[[Path], bytes]]] = {
    "png": (pictures, picture_file("PNG")),
    "jpeg": (pictures, picture_file("JPEG")),
    "webp": (pictures, picture_file("WEBP")),
    "tiff": (pictures, picture_file("TIFF")),
    "gif": (pictures, picture_file("GIF")),
    "wav": (sounds, sound_file("WAV")),
    "flac": (sounds, sound_file("FLAC")),
    "ogg": (sounds, sound_file("OGG")),
    "m4a": (sounds, film_file("a.m4a", codec=None)),
    "mp4": (films, film_file("a.mp4")),
    "mkv": (films, film_file("a.mkv")),
    "avi": (films, film_file("a.avi", codec="mpeg4", sound="mp3")),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_fails_in_one_line(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    use, write = FILES[kind]
    whole = write(tmp_path)
    use(whole)
    rng = np.random.default_rng(len(kind) + len(whole))
    failed = 0
    for trial in range(40):
        data = np.frombuffer(whole, np.uint8).copy()
        spread = 200 if trial % 2 else len(data)
        for place in rng.integers(0, min(spread, len(data)), rng.integers(1, 9)):
            data[place] = rng.integers(0, 256)
        damaged = data[: rng.integers(1, len(data) + 1)] if trial % 3 == 0 else data
        try:
            use(damaged.tobytes())
        except MediaError as error:
            failed += 1
            assert "\n" not in str(error)
    assert failed
    assert capfd.readouterr() == ("", "")
