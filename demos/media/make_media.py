"""Draws and synthesises the media beside it: `python demos/media/make_media.py [FOLDER]`.

picture.png: a house under the sun. recording.flac: four vowels, sung. clip.mp4: a ball that bounces
four times, each with a beep. drawing-1.mp4 to drawing-3.mp4: the picture while it is drawn.
screen.mp4: a note that is typed. music.mp4: keys that light up with a tune. math.mp4: an equation
that is written down. All are made from numbers alone, so nobody else's rights are in them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image, ImageDraw, ImageFont

VOWELS = {
    "a": ((730, 1.0), (1090, 0.5), (2440, 0.1)),
    "i": ((270, 1.0), (2290, 0.3), (3010, 0.2)),
    "u": ((300, 1.0), (870, 0.2), (2240, 0.02)),
    "o": ((570, 1.0), (840, 0.4), (2410, 0.05)),
}
"""Frequencies in Hz, and strengths, of the first three formants (Peterson and Barney, 1952)."""

SPEECH_RATE = 16_000
FILM_RATE, FILM_SIZE, FILM_SOUND_RATE = 24, (320, 240), 44_100
BOUNCES = (0.5, 1.5, 2.5, 3.5)
"""Seconds at which the ball meets the ground."""

PICTURE_SIZE, SKY = (448, 336), (150, 200, 240)
SHAPES: tuple[tuple[str, tuple[float, ...], tuple[int, int, int]], ...] = (
    ("rectangle", (0, 240, 448, 336), (90, 160, 70)),
    ("ellipse", (340, 30, 410, 100), (250, 210, 60)),
    ("rectangle", (110, 150, 250, 270), (200, 90, 70)),
    ("polygon", (95, 150, 180, 80, 265, 150), (110, 60, 50)),
    ("rectangle", (165, 205, 200, 270), (70, 40, 30)),
    ("rectangle", (125, 170, 155, 195), (230, 240, 250)),
    ("rectangle", (205, 170, 235, 195), (230, 240, 250)),
    ("rectangle", (330, 190, 345, 270), (100, 70, 40)),
    ("ellipse", (295, 115, 380, 205), (50, 120, 50)),
)
"""Ground and sun, house (of five shapes), tree: method of the pen, place, colour."""

DRAWINGS = ((0, 2), (2, 7), (7, 9))
"""The shapes that each film of the drawing adds."""

NOTE = (
    "Garden club",
    "Meeting on Friday at 18:30.",
    "Bring seeds, gloves and tea.",
    "Rain moves it to Sunday.",
)
TUNE = (0, 2, 4, 0, 4, 2, 0, 4)
"""Half tones above C4, two a second."""
EQUATION = "3x + 5 = 20     x = ?"


def draw_picture(path: Path) -> None:
    _drawn(len(SHAPES)).save(path, optimize=True)


def _drawn(shapes: int) -> Image.Image:
    """The picture as far as its first so many shapes."""
    image = Image.new("RGB", PICTURE_SIZE, SKY)
    pen = ImageDraw.Draw(image)
    for method, place, colour in SHAPES[:shapes]:
        getattr(pen, method)(place, fill=colour)
    return image


def sing(vowel: str, seconds: float, pitch: float) -> np.ndarray:
    """Harmonics of a gliding pitch, each as strong as the formants near it."""
    t = np.arange(int(seconds * SPEECH_RATE)) / SPEECH_RATE
    phase = 2 * np.pi * pitch * (t - 0.08 * t**2 / seconds)
    wave = np.zeros_like(t)
    for harmonic in range(1, int(SPEECH_RATE / 2.2 / pitch)):
        frequency = harmonic * pitch
        strength = sum(
            gain / (1 + ((frequency - formant) / 90) ** 2) for formant, gain in VOWELS[vowel]
        )
        wave += strength * np.sin(harmonic * phase)
    fade = np.minimum(1, np.minimum(t, seconds - t) / 0.06)
    return wave * fade / np.abs(wave).max()


def record(path: Path) -> None:
    silence = np.zeros(SPEECH_RATE // 8)
    pitches = {"a": 130.0, "i": 150.0, "u": 140.0, "o": 115.0}
    parts = [part for v, pitch in pitches.items() for part in (sing(v, 0.6, pitch), silence)]
    soundfile.write(path, np.concatenate([silence, *parts]) * 0.5, SPEECH_RATE, subtype="PCM_16")


def film(
    path: Path, seconds: int, frame: Callable[[float], Image.Image], sound: np.ndarray
) -> None:
    """Frames by their time in seconds, and sound [n] at `FILM_SOUND_RATE` on both channels."""
    # Bit-exact flags keep dates and version names out of the file.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("libx264", rate=FILM_RATE)
        video.width, video.height, video.pix_fmt = *FILM_SIZE, "yuv420p"
        # With more threads, or with B-frames, x264 does not give the same bytes twice.
        video.options = {
            "crf": "28",
            "flags": "+bitexact",
            "x264-params": "threads=1:bframes=0",
        }
        audio = container.add_stream("aac", rate=FILM_SOUND_RATE, layout="stereo")
        audio.bit_rate = 48_000
        for index in range(seconds * FILM_RATE):
            image = frame(index / FILM_RATE).resize(FILM_SIZE)
            container.mux(video.encode(av.VideoFrame.from_image(image)))
        container.mux(video.encode(None))
        both = np.stack([sound, sound]).astype(np.float32) * np.float32(0.4)
        samples = av.AudioFrame.from_ndarray(both, format="fltp", layout="stereo")
        samples.sample_rate, samples.pts = FILM_SOUND_RATE, 0
        samples.time_base = Fraction(1, FILM_SOUND_RATE)
        container.mux(audio.encode(samples))
        container.mux(audio.encode(None))


def bouncing(seconds: float) -> Image.Image:
    """The ball is on the ground at every bounce, and highest half way between two."""
    width, height = FILM_SIZE
    since = (seconds - BOUNCES[0]) % 1.0
    x, y = 30 + seconds / 4 * (width - 60), height - 50 - 4 * since * (1 - since) * 140
    image = Image.new("RGB", FILM_SIZE, (235, 235, 225))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, height - 30, width, height), fill=(120, 120, 130))
    pen.ellipse((x - 20, y - 20, x + 20, y + 20), fill=(200, 40, 40))
    return image


def typing(seconds: float) -> Image.Image:
    """A window with a note, 25 characters a second."""
    image = Image.new("RGB", FILM_SIZE, (60, 90, 120))
    pen = ImageDraw.Draw(image)
    pen.rectangle((16, 16, 304, 224), fill=(250, 250, 245))
    pen.rectangle((16, 16, 304, 36), fill=(200, 205, 210))
    left = int(seconds * 25)
    for row, line in enumerate(NOTE):
        font = ImageFont.load_default(22 if row == 0 else 16)
        pen.text((30, 50 + 40 * row), line[: max(left, 0)], fill=(20, 20, 20), font=font)
        left -= len(line)
    return image


def playing(seconds: float) -> Image.Image:
    """A keyboard of eight white keys; the one that sounds is lit."""
    image = Image.new("RGB", FILM_SIZE, (40, 40, 50))
    pen = ImageDraw.Draw(image)
    lit = TUNE[int(seconds * 2)] // 2
    for key in range(8):
        colour = (250, 190, 60) if key == lit else (240, 240, 235)
        pen.rectangle((20 + 35 * key, 60, 52 + 35 * key, 200), fill=colour)
    return image


def writing(seconds: float) -> Image.Image:
    """An equation on a board, eight characters a second."""
    image = Image.new("RGB", FILM_SIZE, (30, 70, 50))
    text, font = EQUATION[: int(seconds * 8)], ImageFont.load_default(30)
    ImageDraw.Draw(image).text((20, 100), text, fill=(240, 240, 230), font=font)
    return image


def tones(starts: tuple[float, ...], half_tones: tuple[float, ...], seconds: int) -> np.ndarray:
    """A decaying tone at every start, so many half tones above 440 Hz; float64 [n]."""
    t = np.arange(seconds * FILM_SOUND_RATE) / FILM_SOUND_RATE
    wave = np.zeros_like(t)
    for start, above in zip(starts, half_tones, strict=True):
        since = np.maximum(t - start, 0)
        tone = np.sin(2 * np.pi * 440 * 2 ** (above / 12) * since) * np.exp(-since * 12)
        wave += np.where(t >= start, tone, 0)
    return wave


def scratches(starts: tuple[float, ...], seconds: int) -> np.ndarray:
    """A short noise at every start, as of a key or of chalk; float64 [n]."""
    t = np.arange(seconds * FILM_SOUND_RATE) / FILM_SOUND_RATE
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, len(t))
    strength = sum(np.where(t >= start, np.exp(-(t - start) * 40), 0) for start in starts)
    return noise * np.minimum(strength, 1)


def make(folder: Path) -> None:
    draw_picture(folder / "picture.png")
    record(folder / "recording.flac")
    major_thirds = tuple(12 * float(np.log2(1.25)) * n for n in range(len(BOUNCES)))
    film(folder / "clip.mp4", 4, bouncing, tones(BOUNCES, major_thirds, 4))
    for number, (first, last) in enumerate(DRAWINGS, 1):
        steps = tuple(2 * step / (last - first) for step in range(last - first))

        def drawing(seconds: float, first: int = first, steps: tuple[float, ...] = steps) -> Any:
            return _drawn(first + sum(step <= seconds for step in steps))

        film(folder / f"drawing-{number}.mp4", 2, drawing, scratches(steps, 2))
    keys = tuple(start / 5 for start in range(20))
    film(folder / "screen.mp4", 4, typing, scratches(keys, 4))
    beats = tuple(beat / 2 for beat in range(len(TUNE)))
    film(folder / "music.mp4", 4, playing, tones(beats, tuple(n - 9 for n in TUNE), 4))
    film(folder / "math.mp4", 3, writing, scratches(tuple(n / 8 for n in range(21)), 3))


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
