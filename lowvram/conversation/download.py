"""Files from the web: http and https only, bounded in bytes and seconds, kept for the process."""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
import time
import urllib.request
from collections import OrderedDict
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from lowvram.errors import MediaError

MAX_BYTES = 1 << 30
"""The largest file that is fetched; also the bound of data URLs."""
KEPT_BYTES = 2 << 30
"""Fetched files are kept on disk up to this sum, so that a chat does not fetch them every turn."""
SILENCE_SECONDS = 30.0
TOTAL_SECONDS = 900.0
_PIECE = 1 << 20


def download(url: str) -> Path:
    """The file behind an http(s) URL, fetched once in the life of the process.

    Redirects are followed to http and https only.

    Raises:
        MediaError: it cannot be reached, is refused, is too large, or takes too long.
    """
    return _shelf().get(url)


def shown_url(url: str) -> str:
    """A URL fit to be shown: without password, query or fragment, and not too long."""
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return shown if len(shown) <= 120 else shown[:117] + "..."


class _Shelf:
    """The fetched files, in a temporary folder; the longest unused go first."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="lowvram-"))
        self._files: OrderedDict[str, Path] = OrderedDict()
        self._count = 0
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)

    def get(self, url: str) -> Path:
        if url in self._files:
            self._files.move_to_end(url)
            return self._files[url]
        self._count += 1
        path = self._folder / str(self._count)
        try:
            with path.open("wb") as out:
                _fetch(url, out)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self._files[url] = path
        self._make_room()
        return path

    def _make_room(self) -> None:
        total = sum(path.stat().st_size for path in self._files.values())
        while total > KEPT_BYTES and len(self._files) > 1:
            _, oldest = self._files.popitem(last=False)
            total -= oldest.stat().st_size
            oldest.unlink()


@cache
def _shelf() -> _Shelf:
    return _Shelf()


@cache
def _opener() -> urllib.request.OpenerDirector:
    """Knows http and https and nothing else: a redirect to file:// or ftp:// finds no handler."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    opener.addheaders = [("User-Agent", "lowvram-omni")]
    return opener


def _fetch(url: str, out: BinaryIO) -> None:
    deadline = time.monotonic() + TOTAL_SECONDS
    try:
        with contextlib.closing(_opener().open(url, timeout=SILENCE_SECONDS)) as reply:
            promised = int(reply.headers.get("Content-Length") or 0)
            if promised > MAX_BYTES:
                raise _too_large(url)
            done = 0
            while piece := reply.read(_PIECE):
                done += len(piece)
                if done > MAX_BYTES:
                    raise _too_large(url)
                if time.monotonic() > deadline:
                    raise MediaError(
                        f"{shown_url(url)}: took over {TOTAL_SECONDS:.0f} s; fetch it first"
                    )
                out.write(piece)
            if done < promised:
                raise MediaError(f"{shown_url(url)}: {done} of {promised} bytes came; try again")
    except HTTPError as error:
        reason = str(error.reason).partition("\n")[0]
        raise MediaError(
            f"{shown_url(url)}: the server says {error.code} ({reason}); check the address"
        ) from error
    except (URLError, HTTPException, OSError, ValueError) as error:
        reason = str(getattr(error, "reason", None) or error)
        raise MediaError(
            f"{shown_url(url)}: cannot be fetched ({reason}); check the address"
        ) from error


def _too_large(url: str) -> MediaError:
    return MediaError(
        f"{shown_url(url)}: larger than the {MAX_BYTES >> 20} MiB that are fetched; save it to a "
        "file and give its path"
    )
