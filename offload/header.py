"""The header of one safetensors file, believed only after it was checked against the file.

Layout (github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length, a JSON
object of name -> {dtype, shape, data_offsets}, then the data, with no hole, overlap or rest.
Imports neither torch nor numpy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeGuard

from lowvram.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The format's own bound on the JSON."""

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes an element takes. A tensor of another type may stand in a file; it cannot be read."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `dtype` is the format's word ("BF16"); `offset` counts from byte 0."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> tuple[FileIO, dict[str, TensorInfo]]:
    """Open `path` and check its header. Returns the open file and its tensors in data order.

    Raises `CheckpointError` for anything the format forbids and `OSError` where the system fails;
    the file is closed again then.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    file = FileIO(path, "r")
    try:
        return file, _checked(path, file)
    except BaseException:
        file.close()
        raise


def _checked(path: Path, file: FileIO) -> dict[str, TensorInfo]:
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    if len(first) < 8:
        raise CheckpointError(
            f"{path} has {size} bytes; a safetensors file has at least 10: {_AGAIN}"
        )
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} announces a header of {length} bytes; the format allows {MAX_HEADER_BYTES}: "
            "this is no safetensors file, or a damaged one"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path} announces a header of {length} bytes but has only {size} in all: {_AGAIN}"
        )
    text = b""
    while len(text) < length and (piece := file.read(length - len(text))):
        text += piece
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON object")
    entries = parse_json(text, f"the header of {path}")
    entries.pop("__metadata__", None)
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: the data of {shown(tensor.name)} starts at byte {tensor.offset}, wanted "
                f"{end}, where the one before it ends: the header is damaged"
            )
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header promises {end}: "
            + (_AGAIN if size < end else "the file is damaged")
        )
    return {tensor.name: tensor for tensor in tensors}


_AGAIN = "the file is truncated; download it again"


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `text`; `CheckpointError` if it is none or repeats a key."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{what} names {shown(twice)} twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers of 5000 digits
        raise CheckpointError(f"{what} is not readable JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is a JSON {type(value).__name__}; wanted an object")
    return value


def shown(name: str) -> str:
    """A tensor's name as a message may print it: quoted, escaped, not endless."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


def _tensor(path: Path, name: str, entry: object, data: int) -> TensorInfo:
    """One entry of the header; `data` is the file's byte at which offsets count from."""
    fields: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(k) for k in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _counts(shape) and _counts(offsets) and len(offsets) == 2):
        raise CheckpointError(
            f"{path}: the header's entry for {shown(name)} lacks a valid dtype, shape or "
            "data_offsets: the header is damaged"
        )
    begin, end = offsets
    nbytes = end - begin
    if nbytes < 0 or (dtype in ITEM_BYTES and not _holds(shape, ITEM_BYTES[dtype], nbytes)):
        raise CheckpointError(
            f"{path}: {shown(name)} is {dtype} {str(list(shape))[:80]} in {nbytes} bytes, which "
            "does not agree: the header is damaged"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data + begin, nbytes)


def _counts(value: object) -> TypeGuard[list[int]]:
    """Whether `value` is a list of whole numbers that a file could count with."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _holds(shape: list[int], item: int, nbytes: int) -> bool:
    product = 0 if 0 in shape else item
    for n in shape:
        if product > nbytes:
            return False  # before a long list of large numbers becomes a huge one
        product *= n
    return product == nbytes
