"""Draws and synthesises the media beside it: `python demos/media/make_media.py [FOLDER]`.

picture.png: a house under the sun. recording.flac: four vowels, sung. clip.mp4: a ball that bounces
four times, each with a beep. All are made from numbers alone, so nobody else's rights are in them.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image, ImageDraw

VOWELS = {
    "a": ((730, 1.0), (1090, 0.5), (2440, 0.1)),
    "i": ((270, 1.0), (2290, 0.3), (3010, 0.2)),
    "u": ((300, 1.0), (870, 0.2), (2240, 0.02)),
    "o": ((570, 1.0), (840, 0.4), (2410, 0.05)),
}
"""Frequencies in Hz, and strengths, of the first three formants (Peterson and Barney, 1952)."""

SPEECH_RATE = 16_000
FILM_SECONDS, FILM_RATE, FILM_SIZE, FILM_SOUND_RATE = 4, 24, (320, 240), 44_100
BOUNCES = (0.5, 1.5, 2.5, 3.5)
"""Seconds at which the ball meets the ground."""


def draw_picture(path: Path) -> None:
    image = Image.new("RGB", (448, 336), (150, 200, 240))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 240, 448, 336), fill=(90, 160, 70))
    pen.ellipse((340, 30, 410, 100), fill=(250, 210, 60))
    pen.rectangle((110, 150, 250, 270), fill=(200, 90, 70))
    pen.polygon(((95, 150), (180, 80), (265, 150)), fill=(110, 60, 50))
    pen.rectangle((165, 205, 200, 270), fill=(70, 40, 30))
    pen.rectangle((125, 170, 155, 195), fill=(230, 240, 250))
    pen.rectangle((205, 170, 235, 195), fill=(230, 240, 250))
    pen.rectangle((330, 190, 345, 270), fill=(100, 70, 40))
    pen.ellipse((295, 115, 380, 205), fill=(50, 120, 50))
    image.save(path, optimize=True)


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


def film(path: Path) -> None:
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
        for index in range(FILM_SECONDS * FILM_RATE):
            frame = av.VideoFrame.from_image(_film_frame(index / FILM_RATE))
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(_film_sound(), format="fltp", layout="stereo")
        sound.sample_rate, sound.pts = FILM_SOUND_RATE, 0
        sound.time_base = Fraction(1, FILM_SOUND_RATE)
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))


def _film_frame(seconds: float) -> Image.Image:
    """The ball is on the ground at every bounce, and highest half way between two."""
    width, height = FILM_SIZE
    since = (seconds - BOUNCES[0]) % 1.0
    x, y = 30 + seconds / FILM_SECONDS * (width - 60), height - 50 - 4 * since * (1 - since) * 140
    image = Image.new("RGB", FILM_SIZE, (235, 235, 225))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, height - 30, width, height), fill=(120, 120, 130))
    pen.ellipse((x - 20, y - 20, x + 20, y + 20), fill=(200, 40, 40))
    return image


def _film_sound() -> np.ndarray:
    """A beep at every bounce, higher each time; float32 [2, n]."""
    t = np.arange(FILM_SECONDS * FILM_SOUND_RATE) / FILM_SOUND_RATE
    wave = np.zeros_like(t)
    for number, start in enumerate(BOUNCES):
        since = t - start
        beep = np.sin(2 * np.pi * 440 * 1.25**number * since) * np.exp(-since * 12)
        wave += np.where(since >= 0, beep, 0)
    return np.stack([wave, wave]).astype(np.float32) * np.float32(0.4)


def make(folder: Path) -> None:
    draw_picture(folder / "picture.png")
    record(folder / "recording.flac")
    film(folder / "clip.mp4")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
