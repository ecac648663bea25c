"""Safetensors files written from streams: no tensor need be in memory, and the bytes are the same
every time. A file appears under its name only when it is whole and on the disk.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram.offload import Store, TensorInfo

Piece = bytes | bytearray | memoryview
PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be: the format's word for its type, and its bytes when asked."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[Piece]]


def copied(
    store: Store, info: TensorInfo, check: Callable[[TensorInfo, Piece], None] | None = None
) -> Entry:
    """A stored tensor as it is, read in pieces of 4 MiB that `check` may look at."""

    def pieces() -> Iterator[Piece]:
        buffer = memoryview(bytearray(min(PIECE_BYTES, info.nbytes)))
        for start in range(0, info.nbytes, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, info.nbytes - start)]
            store.read_bytes(info, start, piece)
            if check is not None:
                check(info, piece)
            yield piece

    return Entry(info.name, info.dtype, info.shape, info.nbytes, pieces)


def write_shard(path: Path, entries: Sequence[Entry]) -> None:
    """One safetensors file of those tensors in that order, whole or not at all."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as write:
        write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            for piece in entry.pieces():
                write(piece)


class whole_file:
    """`with whole_file(path) as write`: the file has its name once everything is on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside = path.with_name(f"{path.name}.part")

    def __enter__(self) -> Callable[[Piece], object]:
        self._file = self._aside.open("wb")
        return self._file.write

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is not None:
                return
            self._file.flush()
            os.fsync(self._file.fileno())
        os.replace(self._aside, self._path)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    with whole_file(path) as write:
        write(text.encode())


def copy_file(source: Path, target: Path) -> None:
    """The same bytes under another name, whole or not at all."""
    with source.open("rb") as file, whole_file(target) as write:
        while piece := file.read(PIECE_BYTES):
            write(piece)


def cut(entries: Iterable[Entry], most: int) -> list[list[Entry]]:
    """The tensors in order, in shards of at most `most` bytes (a larger tensor has its own)."""
    shards: list[list[Entry]] = []
    filled = 0
    for entry in entries:
        if not shards or filled + entry.nbytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards
