"""Where a medium's bytes are: a file, a URL, or memory."""

from __future__ import annotations

import base64
import binascii
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from lowvram.conversation.download import MAX_BYTES, download, shown_url
from lowvram.errors import MediaError


@dataclass(frozen=True)
class Source:
    """A medium's bytes: in a file (`path`) or in memory (`data`). `label` names it in messages."""

    label: str
    path: Path | None = None
    data: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes in all."""
        return len(self.data or b"") if self.path is None else self.path.stat().st_size

    def open(self) -> BinaryIO:
        """A seekable file of the bytes."""
        if self.path is None:
            return io.BytesIO(self.data or b"")
        try:
            return self.path.open("rb")
        except OSError as error:
            raise _unreadable(self.label, error) from error


def locate(value: object) -> Source:
    """Find the bytes of a medium given as path, `file://`, `http(s)://` or `data:` URL, or bytes.

    Raises:
        MediaError: nothing there, nothing in it, not a file, not readable, or of another type.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return _in_memory(bytes(value), f"the {len(value)} bytes given")
    if isinstance(value, os.PathLike):
        return _in_file(Path(value), str(value))
    if not isinstance(value, str):
        raise MediaError(
            f"a medium was given as {type(value).__name__}; wanted a path, a URL, bytes, an image "
            "or a numpy array"
        )
    if not value:
        raise MediaError("a medium's path is empty; wanted a path or a URL")
    scheme = value.partition(":")[0].lower()
    if scheme == "data":
        return _data_url(value)
    if scheme in ("http", "https") and "://" in value:
        return _in_file(download(value), shown_url(value))
    if scheme == "file" and "://" in value:
        return _file_url(value)
    if "://" in value:
        raise MediaError(
            f"{shown_url(value)}: {scheme} is not read; wanted http, https, file or data"
        )
    return _in_file(Path(value), value)


def _file_url(url: str) -> Source:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"{url}: names the machine {parts.netloc!r}; wanted file:///path")
    path = url2pathname(parts.path)
    return _in_file(Path(path), path)


def _data_url(url: str) -> Source:
    head, comma, body = url.partition(",")
    label = f"a data URL of {len(url)} characters"
    if not comma:
        raise MediaError(f"{label} has no comma; wanted data:<type>;base64,<data>")
    if len(body) > MAX_BYTES * 4 // 3:
        raise MediaError(f"{label} is larger than the {MAX_BYTES >> 20} MiB that are read")
    if not head.lower().endswith(";base64"):
        return _in_memory(unquote_to_bytes(body), label)
    try:
        return _in_memory(base64.b64decode("".join(body.split()), validate=True), label)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{label} is not base64 ({error}); was it cut?") from error


def _in_memory(data: bytes, label: str) -> Source:
    if not data:
        raise MediaError(f"{label}: empty; wanted the contents of a media file")
    return Source(label, data=data)


def _in_file(path: Path, label: str) -> Source:
    label = "".join(c if c.isprintable() else "?" for c in label)
    try:
        if path.is_dir():
            raise MediaError(f"{label}: a folder; wanted a media file")
        if path.exists() and not path.is_file():
            raise MediaError(f"{label}: not a regular file; copy it into one first")
        if path.stat().st_size == 0:
            raise MediaError(f"{label}: empty (0 bytes); wanted a media file")
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:
        raise _unreadable(label, error) from error
    return Source(label, path=path)


def _unreadable(label: str, error: Exception) -> MediaError:
    if isinstance(error, FileNotFoundError):
        return MediaError(f"{label}: no such file; check the path")
    reason = getattr(error, "strerror", None) or error
    return MediaError(f"{label}: cannot be read ({reason}); check the path and its permissions")
