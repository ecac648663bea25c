"""Speech as WAV (16-bit, 24 kHz, mono): a file that appears only when whole, or a stream."""

from __future__ import annotations

import errno
import os
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

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
    """A WAV file, written beside `path` under another name and moved there by `close`.

    Whether it can be written is found out at once, before there is anything to write; a reply
    without speech leaves no file.

    Raises:
        LowVRAMError: no such folder, a folder itself, or no permission.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._target = path.resolve()  # a link stays a link
        self._part = self._target.with_name(f".{self._target.name}.{os.getpid()}.part")
        self._file: Any = None
        try:
            if self._target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if self._target.exists() and not os.access(self._target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._part.touch()
            self._part.unlink()
        except OSError as error:
            raise _unwritable(self.name, error.strerror) from error

    def write(self, samples: np.ndarray) -> None:
        import soundfile

        try:
            if self._file is None:
                self._file = soundfile.SoundFile(
                    self._part, "w", SAMPLE_RATE, channels=1, subtype="PCM_16", format="WAV"
                )
            self._file.write(pcm16(samples))
        except soundfile.SoundFileError as error:
            raise _unwritable(self.name, str(error)) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            try:
                self._part.replace(self._target)
            except OSError as error:
                self._part.unlink(missing_ok=True)
                raise _unwritable(self.name, error.strerror) from error
            self._file = None

    def discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._part.unlink(missing_ok=True)
            self._file = None


class WavStream:
    """A WAV written as it comes to a stream that cannot go back, such as a pipe."""

    def __init__(self, name: str, stream: BinaryIO) -> None:
        self.name = name
        self._stream = stream
        self._started = False

    def write(self, samples: np.ndarray) -> None:
        if not self._started:
            self._stream.write(stream_header())
            self._started = True
        self._stream.write(pcm16(samples).tobytes())
        self._stream.flush()

    def close(self) -> None:
        if self._stream is not sys.stdout.buffer:
            self._stream.close()

    def discard(self) -> None:
        """What has left cannot be called back."""


def open_sink(output: str) -> Sink:
    """The place that `-o` names: `-` is stdout; a pipe or a device is written as a stream.

    Raises:
        UsageError: the name says it is another kind of file.
        LowVRAMError: the place cannot be written.
    """
    if output == "-":
        return WavStream("standard output", sys.stdout.buffer)
    path = Path(output)
    if path.exists() and not path.is_file() and not path.is_dir():
        return WavStream(output, path.open("wb"))
    if path.suffix.lower() not in ("", ".wav"):
        raise UsageError(f"-o {path}: speech is written as WAV; wanted a name that ends in .wav")
    return WavFile(path)


def pcm16(samples: np.ndarray) -> np.ndarray:
    """Float samples in [-1, 1] as int16; what lies outside is clipped."""
    import numpy as np

    return np.rint(samples.clip(-1, 1) * 32767).astype("<i2")


def stream_header() -> bytes:
    """The 44 bytes before the samples: RIFF, fmt (PCM, mono), data, both sizes unknown."""
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", UNKNOWN_SIZE, b"WAVE"),
        *(b"fmt ", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16),
        *(b"data", UNKNOWN_SIZE),
    )


def _unwritable(name: str, reason: str | None) -> LowVRAMError:
    return LowVRAMError(f"cannot write {name}: {reason}; choose another place with -o")
