"""Pictures: opened safely, turned upright, brought to 8-bit RGB."""

from __future__ import annotations

import contextlib
import struct
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lowvram.conversation.source import locate
from lowvram.errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 178_956_970
"""Pillow's own bound against decompression bombs: 0.5 GiB of RGB."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""Formats that are opened. Pillow knows more, among them some that start other programs."""
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""EXIF orientation -> `PIL.Image.Transpose` that sets it right."""
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""
_PILLOW_ERRORS = (
    *(OSError, ValueError, SyntaxError, IndexError, KeyError, TypeError, EOFError),
    *(struct.error, MemoryError, OverflowError, ArithmeticError),
)
"""What Pillow's decoders raise on damaged files."""


def load_image(value: object) -> tuple[str, Image]:
    """A picture as an upright 8-bit RGB image, with a name for messages.

    `value`: path, URL, bytes, PIL image, or array: [h, w], [h, w, 1], [h, w, 3] or [h, w, 4];
    8-bit, 16-bit, bool, or float in [0, 1]. Transparent parts become white; 16-bit values keep
    their upper half.

    Raises:
        MediaError: it cannot be found or read, is damaged, or is larger than is safe.
    """
    with _opened(value) as (label, image):
        image.load()
        return label, _upright(_to_rgb(image), _orientation(image))


def image_size(value: object) -> tuple[str, tuple[int, int]]:
    """The (height, width) that `load_image` would give, from the header alone where it tells."""
    with _opened(value) as (label, image):
        if image.format == "TIFF":
            image.load()  # Pillow turns these upright itself, and then forgets the orientation
        width, height = image.size
        sideways = _orientation(image) in _SIDEWAYS
        return label, (width, height) if sideways else (height, width)


@contextlib.contextmanager
def _opened(value: object) -> Iterator[tuple[str, Image]]:
    from PIL import Image as pil

    if isinstance(value, pil.Image):
        label = "the image given"
        with _readable(label):
            _check_size(label, value.size)
            yield label, value
    elif isinstance(value, np.ndarray):
        yield "the image given", from_array(value)
    else:
        source = locate(value)
        with source.open() as file, _readable(source.label):
            pil.init()
            image = pil.open(file, formats=[name for name in FORMATS if name in pil.OPEN])
            _check_size(source.label, image.size)
            yield source.label, image


@contextlib.contextmanager
def _readable(label: str) -> Iterator[None]:
    """Whatever Pillow raises about an image becomes one line about it; its warnings are dropped."""
    from PIL import Image as pil

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            yield
    except pil.UnidentifiedImageError as error:
        raise MediaError(
            f"{label}: not an image that is read; wanted {', '.join(FORMATS)}"
        ) from error
    except pil.DecompressionBombError as error:
        raise _too_large(label) from error
    except _PILLOW_ERRORS as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise MediaError(
            f"{label}: damaged or cut short ({reason}); get the image again"
        ) from error


def _upright(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(Transpose(turn))


def _orientation(image: Image) -> int:
    """EXIF orientation, 1 to 8; upright where there is none, or none that can be read."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except _PILLOW_ERRORS:
        return 1


def _check_size(label: str, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise _too_large(label)
    if not size[0] * size[1]:
        raise MediaError(f"{label}: {size[0]} x {size[1]} pixels; wanted at least one")


def _too_large(label: str) -> MediaError:
    return MediaError(
        f"{label}: more than {MAX_PIXELS // 10**6} million pixels, which is not safe to unpack; "
        "make it smaller first"
    )


def _to_rgb(image: Image) -> Image:
    """8-bit RGB; transparent parts on white, as Qwen's tools and transformers do."""
    from PIL import Image as pil

    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide(np.asarray(image))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        straight = {"La": "LA"}.get(image.mode)
        rgba = (image.convert(straight) if straight else image).convert("RGBA")
        white = pil.new("RGBA", rgba.size, (255, 255, 255, 255))
        return pil.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_wide(values: np.ndarray) -> Image:
    """A grey image of more than 8 bits: 16-bit integers, or floats in [0, 1] or [0, 255]."""
    from PIL import Image as pil

    if values.dtype.kind == "f":
        clean = np.nan_to_num(values)
        grey = np.rint(clean * (255 if clean.max() <= 1 else 1)).clip(0, 255)
    else:
        grey = values.astype(np.int64).clip(0, 65535) >> 8
    return pil.fromarray(grey.astype(np.uint8)).convert("RGB")


def from_array(array: np.ndarray) -> Image:
    """An array as a PIL image; see `load_image` for what is taken."""
    from PIL import Image as pil

    shape = array.shape
    if not (array.ndim == 2 or (array.ndim == 3 and shape[2] in (1, 3, 4))) or not array.size:
        raise MediaError(
            f"the image given is an array of shape {list(shape)}; wanted [height, width], or "
            "[height, width, channels] with 1, 3 or 4 channels"
        )
    _check_size("the image given", (shape[1], shape[0]))
    pixels = _to_bytes(array)
    return pil.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and shape[2] == 1 else pixels)


def _to_bytes(array: np.ndarray) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if (
        array.dtype.kind == "f"
        and np.isfinite(array).all()
        and 0 <= array.min() <= array.max() <= 1
    ):
        return np.rint(array * 255).astype(np.uint8)
    raise MediaError(
        f"the image given is an array of {array.dtype} that is not 8-bit, 16-bit, or float in [0, "
        "1]; wanted uint8"
    )
