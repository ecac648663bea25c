"""Recordings: every rate, number of channels and container as 16 kHz mono; bad ones in one line."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from conversation_files import tone, wav_bytes, write_film

from lowvram.conversation.audio import (
    _contained,
    _plain_blocks,
    audio_frames,
    load_audio,
    load_sound_track,
    resample,
    sound_track_frames,
)
from lowvram.conversation.source import locate
from lowvram.conversation.tokens import mel_frames, resampled
from lowvram.errors import MediaError

RATES = [8000, 11025, 16000, 22050, 44100, 48000, 96000, 12345]


def stereo(rate: int, seconds: float = 1.3, channels: int = 2) -> np.ndarray:
    """Channels that differ in pitch and strength, float32 [n, channels]."""
    waves = [tone(seconds, rate, 200 + 90 * c) * (1 - 0.1 * c) for c in range(channels)]
    return np.stack(waves, axis=1)


def by_soundfile(data: bytes) -> np.ndarray:
    """What librosa and transformers do: average the channels, then resample with soxr HQ."""
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(axis=1), rate, 16_000, quality="HQ")


def by_ffmpeg(data: bytes) -> np.ndarray:
    with _contained(locate(data)) as sound:
        return resample(sound)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_both_decoders_give_the_soundfile_way_bit_for_bit(rate: int, channels: int) -> None:
    data = wav_bytes(stereo(rate, channels=channels), rate)
    wanted = by_soundfile(data)
    np.testing.assert_array_equal(load_audio(data), wanted)
    np.testing.assert_array_equal(by_ffmpeg(data), wanted)
    assert np.abs(wanted).max() > 0.2


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_sample_format_has_the_same_full_scale(subtype: str) -> None:
    data = wav_bytes(stereo(16_000), 16_000, subtype)
    np.testing.assert_array_equal(by_ffmpeg(data), load_audio(data))
    assert np.abs(load_audio(data) - stereo(16_000).mean(axis=1)).max() < 1e-2


@pytest.mark.parametrize("form", ["FLAC", "OGG", "AIFF", "W64"])
def test_other_plain_formats(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"sound.{form.lower()}"
    soundfile.write(path, stereo(22_050), 22_050, format=form)
    wave = load_audio(path)
    assert np.array_equal(wave, by_soundfile(path.read_bytes()))
    assert audio_frames(path) == mel_frames(len(wave))


def test_stereo_is_averaged_and_not_made_louder() -> None:
    """FFmpeg's own way to mono would give 0.424 from a stereo sine of 0.3."""
    t = np.arange(16_000) / 16_000
    sine = (0.3 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    for load in (load_audio, by_ffmpeg):
        wave = load(wav_bytes(np.stack([sine, sine], axis=1), 16_000))
        assert np.abs(wave).max() == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "codec", "channels", "rate"),
    [
        ("a.m4a", "aac", "stereo", 48_000),
        ("b.m4a", "aac", "5.1", 44_100),
        ("c.mp3", "mp3", "mono", 22_050),
        ("d.mka", "libopus", "stereo", 48_000),
        ("e.mkv", "pcm_s16le", "stereo", 8000),
    ],
)
def test_compressed_sound_and_its_measure(
    name: str, codec: str, channels: str, rate: int, tmp_path: Path
) -> None:
    path = write_film(
        tmp_path / name, codec=None, sound=codec, channels=channels, sound_rate=rate, seconds=1.5
    )
    wave = load_audio(path)
    assert 1.45 < len(wave) / 16_000 < 1.7
    assert 0.2 < np.abs(wave).max() < 0.5
    assert audio_frames(path) == mel_frames(len(wave))


def test_lengths_after_resampling_are_known_beforehand() -> None:
    rng = np.random.default_rng(0)
    for rate in (8000, 11025, 22050, 44100, 48000, 12345, 192_000):
        for n in [1, 2, 159, 160, *rng.integers(1, 60_000, 8).tolist()]:
            wave = np.zeros(n, np.float32)
            assert resampled(n, rate) == len(soxr.resample(wave, rate, 16_000, quality="HQ"))


def test_arrays() -> None:
    wave = tone(0.5)
    ints = (wave * 32768).astype(np.int16)
    np.testing.assert_array_equal(load_audio(wave), wave)
    np.testing.assert_array_equal(load_audio(ints), ints / np.float32(32768))
    np.testing.assert_array_equal(load_audio((wave, 16_000)), wave)
    two = np.stack([wave, 0.5 * wave], axis=1)
    np.testing.assert_array_equal(load_audio(two), load_audio(two.T))
    np.testing.assert_array_equal(load_audio(two), two.mean(axis=1))
    fast = tone(0.5, 44_100)
    np.testing.assert_array_equal(
        load_audio((fast, 44_100)), soxr.resample(fast, 44_100, 16_000, quality="HQ")
    )
    for value in (wave, ints, (fast, 44_100), two):
        assert audio_frames(value) == mel_frames(len(load_audio(value)))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros(0, np.float32), "no sound"),
        (np.zeros(200, np.float32), "at least 30 ms"),
        (np.full(4000, np.nan, np.float32), "not numbers"),
        (np.zeros((2, 3, 4), np.float32), "3-dimensional"),
        (np.zeros(4000, np.int64), "int64"),
        (np.zeros(4000, bool), "bool"),
        (np.zeros((4000, 80), np.float32), "[4000, 80]"),
        ((np.zeros(4000, np.float32), 0), "(array, samples a second)"),
        ((np.zeros(4000, np.float32),), "(array, samples a second)"),
        (5, "given as int"),
        (b"", "empty"),
        (b"RIFF", "cannot be decoded"),
    ],
)
def test_what_is_no_recording_is_refused(value: Any, said: str) -> None:
    for door in (load_audio, audio_frames):
        with pytest.raises(MediaError) as caught:
            door(value)
        assert said in str(caught.value) and "\n" not in str(caught.value)


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = wav_bytes(stereo(16_000), 16_000)
    soundfile.write(folder / "whole.flac", stereo(16_000), 16_000)
    soundfile.write(folder / "whole.ogg", stereo(16_000), 16_000)
    soundfile.write(folder / "whole.aiff", stereo(16_000), 16_000)
    write_film(folder / "whole.m4a", codec=None, container={"movflags": "faststart"})
    write_film(folder / "whole.mkv", codec=None, seconds=5)
    write_film(folder / "silent.mp4", sound=None)
    contents = {
        "missing.wav": (None, "no such file"),
        "empty.wav": (b"", "empty (0 bytes)"),
        "text.wav": (b"This is a text, not a sound.\n" * 40, "cannot be decoded"),
        "text.mp3": (b"This is a text, not a sound.\n" * 40, "cannot be decoded"),
        "cut.wav": (whole[: len(whole) // 2], "cut short"),
        "header.wav": (whole[:44], "cut short"),
        "nothing.wav": (wav_bytes(np.zeros((0, 1), np.float32), 16_000), "no sound"),
        "cut.flac": ((folder / "whole.flac").read_bytes()[:9000], "whole.flac"),
        "cut.aiff": ((folder / "whole.aiff").read_bytes()[:9000], "cut short"),
        "cut.ogg": ((folder / "whole.ogg").read_bytes()[:6000], "cut short"),
        "cut.m4a": ((folder / "whole.m4a").read_bytes()[:-3000], "cut short"),
        "cut.mkv": ((folder / "whole.mkv").read_bytes()[:20_000], "cut short"),
        "list.m3u8": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "cannot be decoded"),
        "nan.wav": (wav_bytes(np.full(4000, np.nan), 16_000, "FLOAT"), "not numbers"),
    }
    found = {}
    for name, (data, said) in contents.items():
        if data is not None:
            (folder / name).write_bytes(data)
        found[name] = (folder / name, "" if said == "whole.flac" else said)
    found["folder"] = (folder, "a folder")
    found["silent.mp4"] = (folder / "silent.mp4", "no sound track")
    return found


def test_bad_files_are_one_clear_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = bad_files(tmp_path)
    for name, (path, said) in files.items():
        with pytest.raises(MediaError) as caught:
            load_audio(path)
        line = str(caught.value)
        assert said in line and str(path) in line and "\n" not in line, name
    assert capfd.readouterr() == ("", "")


def test_a_decoder_that_stops_early_is_not_believed() -> None:
    class Short:
        channels, frames, left = 1, 100, 40

        def read(self, *_: Any, **__: Any) -> np.ndarray:
            self.left, found = 0, self.left
            return np.zeros((found, 1), np.float32)

    with pytest.raises(MediaError, match="cut short, 40 of 100 samples"):
        list(_plain_blocks(Short(), "a.flac"))


def test_a_stream_of_unknown_length_is_read_to_its_end() -> None:
    """Programs that write a WAV into a pipe leave the largest number as its length."""
    data = bytearray(wav_bytes(stereo(16_000), 16_000))
    at = data.index(b"data") + 4
    data[at : at + 4] = b"\xff\xff\xff\xff"
    assert len(load_audio(bytes(data))) == len(stereo(16_000))


def test_a_recording_without_end_is_refused_by_its_header() -> None:
    """One sample a second in the header would make 250 MB of samples out of 30 kB."""
    data = bytearray(wav_bytes(np.zeros((16_000, 1), np.float32), 16_000))
    at = data.index(b"fmt ") + 12
    data[at : at + 4] = (1).to_bytes(4, "little")
    for door in (load_audio, audio_frames):
        with pytest.raises(MediaError, match="4 hours"):
            door(bytes(data))


def test_the_sound_of_a_film(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mp4")
    silent = write_film(tmp_path / "silent.mp4", sound=None)
    sound = load_sound_track(film)
    assert sound is not None and 1.9 < len(sound) / 16_000 < 2.1
    np.testing.assert_array_equal(sound, load_audio(film))
    assert sound_track_frames(film) == mel_frames(len(sound))
    assert load_sound_track(silent) is None and sound_track_frames(silent) is None


def test_a_sound_track_too_short_for_a_token_is_no_sound(tmp_path: Path) -> None:
    film = write_film(
        tmp_path / "blip.mov", sound="pcm_s16le", seconds=0.005, rate=Fraction(30), frames=10
    )
    assert load_sound_track(film) is None and sound_track_frames(film) is None
