"""The one reader of safetensors: a folder's tensors by name, read straight into place.

Nothing is mapped into memory: a private mapping counts against a process's limits and doubles the
resident set while a tensor is copied out of it. Every read lands where it is wanted, or in one
bounded scratch buffer where the type or the device differs. Headers are read without torch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from lowvram.errors import CheckpointError

from .header import ITEM_BYTES, MAX_HEADER_BYTES, TensorInfo, parse_json, read_header, shown

if TYPE_CHECKING:
    from typing import Self

    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SCRATCH_BYTES = 4 << 20
"""Bytes converted at a time: small enough to stay in a CPU's cache, large enough for a disk."""

_MOST_BUFFERS = 1024  # that POSIX systems fill in one call

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """The torch type of a stored tensor; `CheckpointError` for one that cannot be read."""
    import torch

    name = _TORCH_NAMES.get(info.dtype)
    if name is None:
        raise CheckpointError(
            f"{info.file}: {shown(info.name)} has type {shown(info.dtype)}; "
            f"wanted one of {', '.join(ITEM_BYTES)}"
        )
    found: torch.dtype = getattr(torch, name)
    return found


class Store:
    """The tensors of one checkpoint folder. Close it, or use it as a context manager."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.folder = folder
        self.bytes_read = 0
        """Bytes of tensor data read so far."""
        self._files: dict[Path, FileIO] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._lock = threading.Lock()
        try:
            for path in files:
                self._files[path], tensors = read_header(path)
                for name in tensors.keys() & self._tensors.keys():
                    raise CheckpointError(
                        f"{shown(name)} stands in both {self._tensors[name].file.name} and "
                        f"{path.name} of {folder}; a checkpoint has each tensor once"
                    )
                self._tensors |= tensors
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Store:
        """The store of a folder with `model.safetensors`, or an index and the shards it names.

        All headers are read and checked; no data is. Raises `CheckpointError`.
        """
        try:
            return cls._open(Path(folder))
        except OSError as error:
            raise CheckpointError(
                f"cannot read {error.filename or folder}: {error.strerror}"
            ) from error

    @classmethod
    def _open(cls, folder: Path) -> Store:
        single, index = folder / SINGLE, folder / INDEX
        if single.exists():
            return cls(folder, [single])
        if not index.exists():
            raise CheckpointError(f"{folder} is no checkpoint: {_what_instead(folder)}")
        weight_map = _read_index(index)
        files = sorted({folder / file for file in weight_map.values()})
        for path in files:
            if not path.exists():
                raise CheckpointError(
                    f"{folder} lacks the shard {path.name} that {INDEX} names; download it again"
                )
        store = cls(folder, files)
        for name, file in weight_map.items():
            if name not in store._tensors or store._tensors[name].file != folder / file:
                store.close()
                raise CheckpointError(
                    f"{index} says that {shown(name)} is in {file}, which does not hold it: "
                    "index and shards are of different checkpoints"
                )
        return store

    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order of files and of data."""
        return tuple(self._tensors)

    def has(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of a tensor; `CheckpointError` if there is none of that name."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder} holds no tensor {shown(name)}")
        return self._tensors[name]

    def read_bytes(self, info: TensorInfo, start: int, out: memoryview) -> None:
        """Fill `out` with the stored bytes of a tensor from its byte `start` on."""
        self.read_run(info, start, [out])

    def read_run(self, info: TensorInfo, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, one after the other, with the bytes of a tensor's file from the tensor's
        byte `start` on; they may go on into the tensors behind it. Any thread may call it."""
        file = self._files.get(info.file)
        if file is None:
            raise ValueError(f"the store of {self.folder} is closed")
        todo = [buffer for buffer in buffers if len(buffer)]
        done, at = 0, info.offset + start
        while todo:
            try:
                got = self._read_at(file, todo[:_MOST_BUFFERS], at + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {info.file}: {error.strerror}") from error
            if got <= 0:
                raise CheckpointError(
                    f"{info.file} ends inside {shown(info.name)}: it was changed while in use"
                )
            done += got
            while todo and got >= len(todo[0]):
                got -= len(todo.pop(0))
            if got:
                todo[0] = todo[0][got:]
        with self._lock:
            self.bytes_read += done

    def _read_at(self, file: FileIO, buffers: Sequence[memoryview], offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), buffers, offset)
        with self._lock:  # Windows has no positioned read into a buffer
            file.seek(offset)
            return file.readinto(buffers[0]) or 0

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Fill the contiguous `out`, of the stored shape, converting to its type and device.

        Into CPU memory of the stored type the file is read in place; else through a scratch buffer
        of 4 MiB. On `meta` nothing is read.
        """
        info = self.info(name)
        if tuple(out.shape) != info.shape:
            raise CheckpointError(
                f"{info.file}: {shown(name)} has shape {list(info.shape)}; wanted {list(out.shape)}"
            )
        self.read_flat(name, 0, out.detach().view(-1))

    def read_flat(
        self, name: str, start: int, out: torch.Tensor, at_once: int | None = None
    ) -> None:
        """Fill the one-dimensional `out` with a tensor's elements from number `start` on.

        `at_once` elements are converted at a time, or what 4 MiB of scratch hold.
        """
        import torch

        info = self.info(name)
        stored = torch_dtype(info)
        if out.device.type == "meta" or out.numel() == 0:
            return
        item = ITEM_BYTES[info.dtype]
        if out.device.type == "cpu" and out.dtype == stored:
            self.read_bytes(info, start * item, _bytes_of(out))
            return
        step = at_once or SCRATCH_BYTES // item
        scratch = torch.empty(min(step, out.numel()), dtype=stored, device="cpu")
        for begin in range(0, out.numel(), step):
            piece = scratch[: min(step, out.numel() - begin)]
            self.read_bytes(info, (start + begin) * item, _bytes_of(piece))
            out[begin : begin + piece.numel()].copy_(piece)

    def read(self, name: str) -> torch.Tensor:
        """A tensor of its own in CPU memory, in the stored type and shape."""
        import torch

        info = self.info(name)
        out = torch.empty(info.shape, dtype=torch_dtype(info), device="cpu")
        self.read_into(name, out)
        return out

    def rows(self, name: str, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Rows `indices` of a tensor, in that order, repeats included: stored type, CPU memory.

        Shape `[len(indices), *shape[1:]]`. Each distinct row is read once, neighbours together,
        and nothing else of the tensor is touched.
        """
        import numpy as np
        import torch

        info = self.info(name)
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if not info.shape:
            raise CheckpointError(f"{info.file}: {shown(name)} is a single number; it has no rows")
        if wanted.size and (wanted.min() < 0 or wanted.max() >= info.shape[0]):
            bad = int(wanted.min() if wanted.min() < 0 else wanted.max())
            raise CheckpointError(
                f"row {bad} of {shown(name)} was asked for, which has {info.shape[0]} rows: the "
                "tokenizer and the weights are of different models"
            )
        distinct, place = np.unique(wanted, return_inverse=True)
        table = torch.empty((len(distinct), *info.shape[1:]), dtype=torch_dtype(info), device="cpu")
        if table.numel():
            width = info.nbytes // info.shape[0]
            target = _bytes_of(table.view(-1))
            for first, last in _runs(distinct.tolist()):
                row = int(distinct[first])
                self.read_bytes(info, row * width, target[first * width : last * width])
        if np.array_equal(distinct, wanted):
            return table
        return table[torch.from_numpy(place.reshape(-1))]

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bytes_of(flat: torch.Tensor) -> memoryview:
    """The memory of a one-dimensional, contiguous, non-empty CPU tensor."""
    import torch

    return flat.view(torch.uint8).numpy().data


def _runs(numbers: Sequence[int]) -> Iterable[tuple[int, int]]:
    """(first, one past the last) position of each run of consecutive `numbers`."""
    first = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield first, i
            first = i


def _read_index(index: Path) -> dict[str, str]:
    """tensor -> shard of an index file; a shard's name must be a plain name in the same folder."""
    if index.stat().st_size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{index} has {index.stat().st_size} bytes; it is no index")
    weight_map = parse_json(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; wanted tensor names and their files")
    for file in weight_map.values():
        if not (isinstance(file, str) and _is_plain(file)):
            raise CheckpointError(
                f"{index} names the file {shown(str(file))}; wanted the plain name of a "
                ".safetensors file in the same folder"
            )
    return weight_map


def _is_plain(file: str) -> bool:
    names = {PurePosixPath(file).name, PureWindowsPath(file).name}
    return names == {file} and file.endswith(".safetensors") and file.isprintable()


def _what_instead(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder" if not folder.exists() else "it is not a folder"
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt"))
    wanted = f"wanted {SINGLE}, or {INDEX} and its shards"
    return f"it holds {', '.join(found[:3])}; {wanted}" if found else wanted
