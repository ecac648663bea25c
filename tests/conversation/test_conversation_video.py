"""Videos: which frames, at what time, the right way up; and files that are none."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversation_files import picture, prepared, user, wav_bytes, write_film
from PIL import Image

from lowvram.config import VisionConfig
from lowvram.conversation import MediaSettings, Tokenizer
from lowvram.conversation import video as videos
from lowvram.conversation.pixels import PixelFormat
from lowvram.conversation.video import Sampling, frames_taken, load_video, pick, sample_video
from lowvram.errors import MediaError

FORMAT = PixelFormat.read(None, VisionConfig())


def load(value: Any, **settings: Any) -> tuple[Sampling, np.ndarray]:
    chosen = MediaSettings(**settings)
    sampling, frames = load_video(value, chosen, FORMAT)
    assert sample_video(value, chosen, FORMAT) == sampling
    assert frames.shape == (sampling.frames, *sampling.size, 3)
    return sampling, frames


def shown(frames: np.ndarray) -> list[int]:
    """Which frames of a film by `write_film` these are: frame i has brightness 4 * i."""
    return [round(float(frame.mean()) / 4) for frame in frames]


def published_frames(total: int, rate: float, fps: float, most: int) -> list[int]:
    """qwen-omni-utils' rule, written out: how many frames, then `linspace` over their numbers."""
    highest = min(most, total) // 2 * 2
    count = int(min(min(max(total / rate * fps, 4), highest), total)) // 2 * 2
    return torch.linspace(0, total - 1, count).round().long().tolist()


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 3.0, 60.0])
@pytest.mark.parametrize(("total", "rate", "most"), [(60, 30, 768), (47, 10, 768), (60, 25, 6)])
def test_frames_are_those_of_the_published_rule(
    total: int, rate: int, most: int, fps: float, tmp_path: Path
) -> None:
    film = write_film(tmp_path / "film.mp4", frames=total, rate=rate, sound=None)
    sampling, frames = load(film, fps=fps, max_frames=most)
    wanted = published_frames(total, rate, fps, most)
    assert np.abs(np.array(shown(frames)) - wanted).max() <= 1  # brightness survives H.264 to 1
    assert sampling.frames == len(wanted)
    assert sampling.seconds_per_grid == pytest.approx(2 * total / rate / len(wanted))


def test_picks_are_those_of_linspace_where_frames_come_evenly() -> None:
    for total, count in [(120, 8), (61, 4), (1000, 64), (5, 4), (2, 2)]:
        wanted = torch.linspace(0, total - 1, count, dtype=torch.float64).round().long().tolist()
        assert pick(tuple(range(0, 512 * total, 512)), count) == wanted


def test_a_whole_number_of_seconds_is_sampled_at_exactly_two_frames_a_second() -> None:
    settings = MediaSettings()
    for seconds in (2, 3, 15, 60, 384):
        for rate in (Fraction(24), Fraction(25), Fraction(30), Fraction(60)):
            assert frames_taken(int(seconds * rate), rate, settings) == 2 * seconds
    assert frames_taken(10_000, Fraction(10), settings) == 768


@pytest.mark.parametrize("form", ["mkv", "mp4", "mov"])
def test_frames_are_picked_by_the_time_at_which_they_are_shown(form: str, tmp_path: Path) -> None:
    """Half of the frames are shown in the first second, the other half in the next nine."""
    times = [i * 50 for i in range(20)] + [1000 + i * 450 for i in range(20)]
    film = write_film(tmp_path / f"film.{form}", frames=40, times=times, sound=None)
    sampling, frames = load(film, fps=1.0)
    starts = [times[i] for i in shown(frames)]
    wanted = np.linspace(times[0], times[-1], len(starts))
    assert np.abs(starts - wanted).max() <= 225 + 1
    seconds = (times[-1] + 450) / 1000
    assert sampling.seconds_per_grid == pytest.approx(2 * seconds / len(starts), rel=0.05)


CONTAINERS: dict[str, dict[str, Any]] = {
    "a.mp4": {},
    "b.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "c.mkv": {},
    "d.webm": {"codec": "libvpx-vp9", "sound": "libopus"},
    "e.avi": {"codec": "mpeg4", "sound": "mp3"},
    "f.ts": {},
    "g.mov": {"sound": "pcm_s16le"},
    "h.mp4": {"rate": Fraction(30000, 1001)},
    "i.mp4": {"times": [i * i for i in range(60)]},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_measure_equals_prepare_in_every_container(
    name: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    film = write_film(tmp_path / name, **CONTAINERS[name])
    prompt, shape = prepared(user({"type": "video", "video": str(film)}), tokenizer)
    assert prompt.shape == shape
    ((pairs, _, _),) = shape.grids
    assert pairs == (3 if name == "i.mp4" else 2)
    assert len(shape.audio_frames) == 1
    assert prompt.vision[0].frames.std() > 30


@pytest.mark.parametrize("total", [1, 2, 3, 5])
def test_very_short_clips(total: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    film = write_film(tmp_path / "film.mp4", frames=total, sound=None)
    prompt, shape = prepared(user({"type": "video", "video": film}), tokenizer)
    assert prompt.shape == shape
    assert shape.grids[0][0] == {1: 1, 2: 1, 3: 1, 5: 2}[total]
    assert prompt.vision[0].patches(0).shape == (shape.grids[0][1] * shape.grids[0][2], 1176)


def turn(film: Path) -> None:
    """Write a quarter turn to the right into an MP4, as a phone held upright does."""
    data = bytearray(film.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    matrix = (0, 1, 0, -1, 0, 0, 0, 0, 0x4000)
    data[at : at + 36] = b"".join(struct.pack(">i", value << 16) for value in matrix[:8]) + (
        struct.pack(">I", matrix[8] << 16)
    )
    film.write_bytes(bytes(data))


def test_a_phone_held_upright(tmp_path: Path) -> None:
    import av

    film = tmp_path / "film.mp4"
    wide = np.zeros((96, 192, 3), np.uint8)
    wide[:, :96] = 255  # bright on the left; at the top once it is turned
    with av.open(str(film), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 192, 96, "yuv420p"
        for _ in range(20):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(wide, format="rgb24")))
        out.mux(stream.encode(None))
    turn(film)
    sampling, frames = load(film)
    height, width = sampling.size
    assert height > width
    assert frames[0, : height // 3].mean() > 200 > 50 > frames[0, -height // 3 :].mean()


def test_frames_given_as_arrays_and_images(tmp_path: Path) -> None:
    stack = np.stack([picture(112, 168, seed) for seed in range(5)])
    for value in (stack, list(stack), [Image.fromarray(frame) for frame in stack]):
        sampling, frames = load(value, min_pixels=1, max_pixels=112 * 168)
        np.testing.assert_array_equal(frames, stack)
        assert sampling.seconds_per_grid == 1.0
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, frame in zip(paths, stack, strict=True):
        Image.fromarray(frame).save(path)
    _, frames = load([str(path) for path in paths], min_pixels=1)
    np.testing.assert_array_equal(frames, stack)
    assert load(stack, fps=4.0)[0].seconds_per_grid == 0.5


def test_too_many_frames_given_are_thinned_evenly() -> None:
    stack = np.stack([np.full((112, 168, 3), 4 * i, np.uint8) for i in range(9)])
    sampling, frames = load(stack, max_frames=5)
    assert shown(frames) == [0, 3, 5, 8]
    assert sampling.seconds_per_grid == pytest.approx(2 * 9 / 2 / 4)


def test_only_the_picked_frames_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = write_film(tmp_path / "film.mp4", frames=60, sound=None)
    unpacked = []
    upright = videos._upright
    monkeypatch.setattr(videos, "_upright", lambda frame: unpacked.append(1) or upright(frame))
    assert load(film)[0].frames == len(unpacked) == 4


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = write_film(folder / "whole.mp4", frames=120, container={"movflags": "faststart"})
    late = write_film(folder / "late.mp4", frames=120)
    matroska = write_film(folder / "whole.mkv", frames=120, seconds=4)
    write_film(folder / "sound.mp4", codec=None)
    write_film(folder / "none.mp4", frames=0)
    write_film(folder / "strip.mp4", frames=10, size=(2, 640), sound=None)
    contents = {
        "missing.mp4": (None, "no such file"),
        "empty.mp4": (b"", "empty (0 bytes)"),
        "text.mp4": (b"This is a text, not a film.\n" * 40, "cannot be decoded"),
        "cut.mp4": (whole.read_bytes()[:-3000], "cut short"),
        "cut-late.mp4": (late.read_bytes()[:-3000], "cannot be decoded"),
        "cut.mkv": (matroska.read_bytes()[: matroska.stat().st_size // 2], "cut short"),
        "sound.wav": (wav_bytes(np.zeros((8000, 1), np.float32), 16_000), "no video track"),
        "list.m3u8": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "cannot be decoded"),
        "script.mp4": (b"ffconcat version 1.0\nfile whole.mp4\n", "cannot be decoded"),
    }
    found: dict[str, tuple[Path, str]] = {}
    for name, (data, said) in contents.items():
        if data is not None:
            (folder / name).write_bytes(data)
        found[name] = (folder / name, said)
    return found | {
        "sound.mp4": (folder / "sound.mp4", "no video track"),
        "none.mp4": (folder / "none.mp4", "no video track"),
        "strip.mp4": (folder / "strip.mp4", "200 times"),
    }


def test_bad_files_are_one_clear_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, (path, said) in bad_files(tmp_path).items():
        for door in (load_video, sample_video):
            with pytest.raises(MediaError) as caught:
                door(path, MediaSettings(), FORMAT)
            line = str(caught.value)
            assert said in line and str(path) in line and "\n" not in line, name
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "no frames"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no frames"),
        (np.zeros((8, 8, 3), np.uint8), "[8, 8, 3]"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "2 different sizes"),
        (np.zeros((4, 8, 8, 2), np.uint8), "[8, 8, 2]"),
        (3.5, "given as float"),
    ],
)
def test_what_is_no_video_is_refused(value: Any, said: str) -> None:
    with pytest.raises(MediaError) as caught:
        load_video(value, MediaSettings(), FORMAT)
    assert said in str(caught.value)


def test_cover_art_is_no_video(tmp_path: Path) -> None:
    import io

    import av

    song = tmp_path / "song.mp3"
    cover = io.BytesIO()
    Image.fromarray(picture(64, 64)).save(cover, "PNG")
    write_film(tmp_path / "plain.mp3", codec=None, sound="mp3")
    with av.open(str(tmp_path / "plain.mp3")) as plain, av.open(str(song), "w") as out:
        sound = out.add_stream_from_template(plain.streams.audio[0])
        art = out.add_stream("png", rate=1)
        art.width, art.height, art.pix_fmt = 64, 64, "rgb24"
        art.disposition = av.stream.Disposition.attached_pic.value
        for packet in plain.demux():
            if packet.size:
                packet.stream = sound
                out.mux(packet)
        still = av.VideoFrame.from_ndarray(picture(64, 64), format="rgb24")
        out.mux(art.encode(still))
        out.mux(art.encode(None))
    with av.open(str(song)) as found:
        assert found.streams.video
    with pytest.raises(MediaError, match="no video track"):
        load_video(song, MediaSettings(), FORMAT)
