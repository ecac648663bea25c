"""Speech as WAV (16-bit, 24 kHz, mono): a file that is valid while it grows, or a stream."""

from __future__ import annotations

import errno
import io
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from lowvram.cli.output import STDOUT
from lowvram.errors import LowVRAMError, UsageError
from lowvram.events import SAMPLE_RATE

if TYPE_CHECKING:
    import numpy as np

UNKNOWN_SIZE = 0xFFFFFFFF
"""What a RIFF header says when the length is not known; players read to the end of the stream."""


class Sink(Protocol):
    """Where speech goes. `close` keeps what was written, `discard` leaves no trace of it."""

    name: str

    def write(self, samples: np.ndarray) -> None: ...
    def close(self) -> None: ...
    def discard(self) -> None: ...


class WavFile:
    """A WAV file that opens at every moment: samples are appended, then counted in the header.

    Whether it can be written is found out at once, before there is anything to write. It appears
    with the first sound, or with `close`, so that a reply without speech is a file without samples;
    what was there before waits beside it until then, and `discard` puts it back. Where the disk is
    full, what it took is kept.

    Raises:
        LowVRAMError: no such folder, a folder itself, no permission, or no room.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._target = path.resolve()  # a link stays a link
        self._fresh, self._before = (
            self._target.with_name(f".{self._target.name}.{os.getpid()}.{what}")
            for what in ("new", "before")
        )
        self._file: io.FileIO | None = None
        self._bytes = 0
        self._over = False
        try:
            if self._target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if self._target.exists() and not os.access(self._target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._fresh.touch()
            self._fresh.unlink()
        except OSError as error:
            raise LowVRAMError(_unwritable(self.name, error)) from error

    def write(self, samples: np.ndarray) -> None:
        data = pcm16(samples).tobytes()
        try:
            file = self._file or self._begin()
            _write_all(file, data)
            # A file that is cut off between the two holds samples that are not counted yet.
            file.seek(0)
            _write_all(file, header(self._bytes + len(data)))
            file.seek(0, os.SEEK_END)
        except OSError as error:
            raise LowVRAMError(_unwritable(self.name, error, self._rescue())) from error
        self._bytes += len(data)

    def close(self) -> None:
        if self._over:
            return
        try:
            file = self._file or self._begin()
        except OSError as error:
            self.discard()
            raise LowVRAMError(_unwritable(self.name, error)) from error
        self._over = True
        file.close()
        self._before.unlink(missing_ok=True)

    def discard(self) -> None:
        if self._over:
            return
        self._over = True
        if self._file is not None:
            self._file.close()
            self._target.unlink(missing_ok=True)
        self._fresh.unlink(missing_ok=True)
        if self._before.exists():
            self._before.replace(self._target)
            # Where both are still names of one file, that did nothing.
            self._before.unlink(missing_ok=True)

    def _begin(self) -> io.FileIO:
        """The file under its name, where there is what was there before or a WAV at any moment."""
        file = io.FileIO(self._fresh, "w")
        try:
            _write_all(file, header(0))
            if self._target.exists():
                try:
                    os.link(self._target, self._before)
                except OSError:  # not every disk has links
                    self._target.replace(self._before)
            self._fresh.replace(self._target)
        except OSError:
            file.close()
            raise
        self._file = file
        return file

    def _rescue(self) -> float:
        """Seconds that are in the file when it cannot grow; without any, it is as if never made."""
        if self._file is None or not self._bytes:
            self.discard()
            return 0.0
        self._file.truncate(len(header(0)) + self._bytes)
        self.close()
        return self._bytes / (2 * SAMPLE_RATE)


class WavStream:
    """A WAV written as it comes to a stream that cannot go back, such as a pipe."""

    def __init__(self, name: str, stream: BinaryIO | io.FileIO) -> None:
        self.name = name
        self._stream = stream
        self._started = False

    def write(self, samples: np.ndarray) -> None:
        self._send(pcm16(samples).tobytes())

    def close(self) -> None:
        self._send(b"")
        if self._stream is not sys.stdout.buffer:
            self._stream.close()

    def discard(self) -> None:
        """What has left cannot be called back."""

    def _send(self, data: bytes) -> None:
        try:
            if not self._started:
                _write_all(self._stream, header(None))
                self._started = True
            _write_all(self._stream, data)
            self._stream.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from error


def open_sink(output: str, read: Iterable[str] = ()) -> Sink:
    """The place that `-o` names: `-` is stdout; a pipe or a device is written as a stream.

    Raises:
        UsageError: the name says it is another kind of file, or it is one of those that are `read`.
        LowVRAMError: the place cannot be written.
    """
    if output == "-":
        return WavStream(STDOUT, sys.stdout.buffer)
    path = Path(output)
    if path.exists() and not path.is_file() and not path.is_dir():
        return WavStream(output, io.FileIO(path, "w"))
    if path.suffix.lower() not in ("", ".wav"):
        raise UsageError(f"-o {path}: speech is written as WAV; wanted a name that ends in .wav")
    if any(_same(path, place) for place in read):
        raise UsageError(
            f"{path} is read by this request, whose speech would take its place; choose another "
            "place with -o"
        )
    return WavFile(path)


def _same(path: Path, place: str) -> bool:
    try:
        return path.samefile(place)
    except (OSError, ValueError):  # an address, or nothing there
        return False


def pcm16(samples: np.ndarray) -> np.ndarray:
    """Float samples in [-1, 1] as int16; what lies outside is clipped."""
    import numpy as np

    return np.rint(samples.clip(-1, 1) * 32767).astype("<i2")


def header(nbytes: int | None) -> bytes:
    """The 44 bytes before so many bytes of samples: RIFF, fmt (PCM, mono), data; None where nobody
    knows yet how many there will be."""
    riff, data = (UNKNOWN_SIZE,) * 2 if nbytes is None else (36 + nbytes, nbytes)
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", riff, b"WAVE"),
        *(b"fmt ", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16),
        *(b"data", data),
    )


def _write_all(file: BinaryIO | io.FileIO, data: bytes) -> None:
    """All of it, or an OSError: a disk with little room takes a part first."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _unwritable(name: str, error: OSError, kept: float = 0.0) -> str:
    found = f"; its first {kept:.1f} s are kept" if kept else ""
    return f"cannot write {name}: {error.strerror}{found}; choose another place with -o"
