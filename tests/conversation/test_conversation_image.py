"""Pictures: patches against transformers bit for bit, odd modes, and files that are none."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversation_files import picture
from conversation_oracle import image_processor
from PIL import Image, ImageOps

from lowvram.config import VisionConfig
from lowvram.conversation import image as images
from lowvram.conversation.image import image_size, load_image
from lowvram.conversation.pixels import BICUBIC, VIDEO_PIXELS, PixelFormat, smart_resize
from lowvram.errors import MediaError

FORMAT = PixelFormat.read(None, VisionConfig())


def encoded(image: Image.Image, form: str, **settings: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **settings)
    return out.getvalue()


def rgb(height: int = 40, width: int = 60) -> Image.Image:
    return Image.fromarray(picture(height, width))


def our_patches(image: Image.Image, bounds: tuple[int, int]) -> np.ndarray:
    height, width = smart_resize(image.height, image.width, 28, *bounds)
    frames = np.asarray(image.resize((width, height), BICUBIC))[None]
    return FORMAT.patches(frames, 0)


@pytest.mark.oracle
@pytest.mark.parametrize("size", [(100, 130), (28, 28), (5, 700), (333, 41), (1, 150), (640, 480)])
def test_patches_are_those_of_transformers(size: tuple[int, int]) -> None:
    image = rgb(*size)
    theirs = image_processor()(images=[image], return_tensors="np")
    ours = our_patches(image, FORMAT.image_pixels)
    np.testing.assert_array_equal(ours, theirs["pixel_values"])
    assert ours.dtype == np.float32


@pytest.mark.oracle
def test_patches_with_other_bounds_and_normalisation() -> None:
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "rescale_factor": 0.01}
    bounds = {"min_pixels": 40_000, "max_pixels": 50_000}
    form = PixelFormat.read(settings | bounds, VisionConfig())
    assert form.image_pixels == (40_000, 50_000)
    height, width = smart_resize(100, 130, 28, 40_000, 50_000)
    frames = np.asarray(rgb(100, 130).resize((width, height), BICUBIC))[None]
    theirs = image_processor(**settings, **bounds)(images=[rgb(100, 130)], return_tensors="np")
    np.testing.assert_array_equal(form.patches(frames, 0), theirs["pixel_values"])


@pytest.mark.oracle
def test_video_patches_hold_two_frames_each_as_an_image_would() -> None:
    """The frames of a pair are the two halves of what transformers makes of each as an image."""
    frames = np.stack([picture(56, 84, seed) for seed in range(3)])
    for pair, (first, second) in enumerate([(0, 1), (2, 2)]):
        ours = FORMAT.patches(frames, pair).reshape(-1, 3, 2, 196)
        for half, index in enumerate((first, second)):
            given = [Image.fromarray(frames[index])]
            theirs = image_processor()(images=given, return_tensors="np")["pixel_values"]
            np.testing.assert_array_equal(
                ours[:, :, half], theirs.reshape(-1, 3, 2, 196)[:, :, half]
            )


@pytest.mark.oracle
def test_the_size_rule_is_the_published_one() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    rng = np.random.default_rng(0)
    for _ in range(3000):
        height, width = (int(x) for x in np.exp(rng.uniform(0, 9, 2)))
        lowest = int(np.exp(rng.uniform(6, 13)))
        bounds = (lowest, lowest + int(np.exp(rng.uniform(0, 14))))
        try:
            wanted = theirs(height, width, 28, *bounds)
        except ValueError:
            wanted = None
        try:
            found = smart_resize(height, width, 28, *bounds)
        except ValueError:
            found = None
        assert found == wanted, (height, width, bounds)


def test_frames_of_a_long_video_share_the_published_total() -> None:
    assert FORMAT.video_bounds(VIDEO_PIXELS, 300) == VIDEO_PIXELS
    lowest, highest = FORMAT.video_bounds(VIDEO_PIXELS, 768)
    assert (lowest, highest) == (VIDEO_PIXELS[0], 300 * 28 * 28)  # 115,200 tokens / 384 pairs
    assert FORMAT.video_bounds((100, 50_000), 768) == (100, 50_000)
    assert FORMAT.video_bounds((1_000_000, 2_000_000), 768)[1] == 1_050_000


MODES = {
    "RGBA": lambda: rgb().convert("RGBA"),
    "LA": lambda: rgb().convert("LA"),
    "L": lambda: rgb().convert("L"),
    "P": lambda: rgb().convert("P"),
    "1": lambda: rgb().convert("1"),
    "CMYK": lambda: rgb().convert("CMYK"),
    "I;16": lambda: Image.fromarray(np.asarray(rgb().convert("L")).astype(np.uint16) * 257),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    data = encoded(MODES[mode](), form)
    _, image = load_image(data)
    assert (image.mode, image.size) == ("RGB", (60, 40))
    assert image_size(data)[1] == (40, 60)
    coarse = [
        np.asarray(picture.convert("L").resize((6, 4), Image.Resampling.BOX), np.float32)
        for picture in (image, rgb())
    ]
    assert np.abs(coarse[0] - coarse[1]).max() < 40
    assert np.abs(coarse[0] - coarse[1]).mean() < 10


def test_sixteen_bits_keep_their_upper_half() -> None:
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    for given in (values, encoded(Image.fromarray(values), "PNG")):
        pixels = np.asarray(load_image(given)[1])
        np.testing.assert_array_equal(pixels, np.repeat((values >> 8)[:, :, None], 3, axis=2))


def test_transparent_parts_become_white() -> None:
    """As in transformers 5.23 and Qwen's own tools; transformers 5.17 still dropped the alpha."""
    rgba = np.dstack([picture(40, 60), picture(40, 60, 5)[:, :, 0]])
    alpha = rgba[:, :, 3:] / 255.0
    wanted = rgba[:, :, :3] * alpha + 255 * (1 - alpha)
    for value in (rgba, Image.fromarray(rgba), encoded(Image.fromarray(rgba), "PNG")):
        assert np.abs(np.asarray(load_image(value)[1]) - wanted).max() <= 1
    palette = Image.fromarray(picture(40, 60)).convert("P")
    clear = int(np.asarray(palette)[7, 7])
    palette.info["transparency"] = clear
    found = np.asarray(load_image(palette)[1])
    see_through = np.asarray(palette) == clear
    assert (found[see_through] == 255).all()
    np.testing.assert_array_equal(
        found[~see_through], np.asarray(palette.convert("RGB"))[~see_through]
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"lossless": True} if form == "WEBP" else {}
    data = encoded(rgb(), form, exif=exif, **settings)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    _, image = load_image(data)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(wanted))
    assert image.size == ((40, 60) if orientation > 4 else (60, 40))
    assert image_size(data)[1] == (image.height, image.width)


def test_broken_exif_does_not_spoil_the_picture() -> None:
    data = encoded(rgb(), "JPEG", exif=b"Exif\0\0neither of the two byte orders")
    assert load_image(data)[1].size == (60, 40)
    assert image_size(data)[1] == (40, 60)


def test_arrays_and_pil_images() -> None:
    array = picture(40, 60)
    for value in (array, Image.fromarray(array), array / 255.0):
        np.testing.assert_array_equal(np.asarray(load_image(value)[1]), array)
        assert image_size(value)[1] == (40, 60)
    grey = array[:, :, :1]
    np.testing.assert_array_equal(np.asarray(load_image(grey)[1]), np.repeat(grey, 3, axis=2))
    np.testing.assert_array_equal(
        np.asarray(load_image(array > 127)[1]), (array > 127).astype(np.uint8) * 255
    )


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than anybody should unpack."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"This is a text.\n" * 20, "not an image"),
        (encoded(rgb(300, 300), "JPEG")[:2000], "damaged or cut short"),
        (encoded(rgb(300, 300), "PNG")[:2000], "damaged or cut short"),
        (bomb(60_000, 60_000), "not safe to unpack"),
        (bomb(13_000, 14_000), "not safe to unpack"),
        (b"", "empty"),
        (np.zeros((4, 4, 2), np.uint8), "[4, 4, 2]"),
        (np.zeros((0, 4, 3), np.uint8), "[0, 4, 3]"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.full((4, 4, 3), 2.0), "float64"),
        (np.full((4, 4, 3), np.nan), "float64"),
        (7, "given as int"),
        ("", "path is empty"),
        ("no/such.png", "no such file"),
    ],
)
def test_what_is_no_picture_is_refused(value: Any, said: str) -> None:
    with pytest.raises(MediaError) as caught:
        load_image(value)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_bound_on_pixels_does_not_hang_on_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as programs do that trust their files
    for door in (load_image, image_size):
        with pytest.raises(MediaError, match="not safe to unpack"):
            door(bomb(60_000, 60_000))


def test_formats_that_start_programs_are_not_opened(tmp_path: Path) -> None:
    """Pillow would hand EPS to Ghostscript."""
    path = tmp_path / "drawing.png"
    path.write_bytes(encoded(rgb(), "EPS"))
    assert Image.open(path).format == "EPS"
    with pytest.raises(MediaError, match="not an image"):
        load_image(path)
    assert "EPS" not in images.FORMATS


def test_one_side_of_one_pixel() -> None:
    assert FORMAT.fit("a.png", (1, 200), FORMAT.image_pixels) == (28, 812)
    with pytest.raises(MediaError, match=r"a.png: 201 x 1 pixels.*200 times.*crop"):
        FORMAT.fit("a.png", (1, 201), FORMAT.image_pixels)
