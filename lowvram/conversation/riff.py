"""Whether a sound file is as long as its header says, where the decoder does not say so itself."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from lowvram.conversation.source import Source
from lowvram.errors import MediaError

_STREAMED = (0, 0x7FFFFF00, 0x7FFFFFFF, 0xFFFFFF00, 0xFFFFFFFF)
"""Lengths that programs write which did not know the length yet: all that follows is sound."""
_OGG_TAIL = 1 << 16


def check_whole(source: Source) -> None:
    """Raise MediaError where a WAV, AIFF or Ogg file ends before its own bookkeeping says."""
    with source.open() as file:
        magic = file.read(12)
        if magic[:4] == b"RIFF" and magic[8:] == b"WAVE":
            _check_wav(file, source.label)
        elif magic[:4] == b"FORM":
            _check_length(8 + int.from_bytes(magic[4:8], "big"), source.size, source.label)
        elif magic[:4] == b"OggS":
            _check_ogg(file, source.label)


def _check_wav(file: BinaryIO, label: str) -> None:
    size = file.seek(0, os.SEEK_END)
    at = 12
    while at + 8 <= size:
        file.seek(at)
        name, length = struct.unpack("<4sI", file.read(8))
        if name == b"data":
            if length not in _STREAMED:
                _check_length(at + 8 + length, size, label)
            return
        at += 8 + length + length % 2


def _check_length(promised: int, size: int, label: str) -> None:
    if promised > size:
        raise MediaError(
            f"{label}: cut short, {size} of {promised} bytes are there; get the recording again"
        )


def _check_ogg(file: BinaryIO, label: str) -> None:
    """The last page must be complete: 27 bytes, a table of lengths, and their sum in bytes."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _OGG_TAIL))
    tail = file.read()
    at = tail.rfind(b"OggS")
    segments = tail[at + 26] if at >= 0 and at + 26 < len(tail) else 0
    table = tail[at + 27 : at + 27 + segments]
    if at < 0 or not segments or at + 27 + segments + sum(table) > len(tail):
        raise MediaError(f"{label}: cut short in the middle of a page; get the recording again")
