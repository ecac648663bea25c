"""The voices of a checkpoint: `spk_dict.pt`, written and listed without torch.

The file is a dictionary saved by torch: voice -> `bos_token` (the text token speech begins with),
`cond` (speaker embedding [1, enc_emb_dim]) and `ref_mel` (reference recording [1, frames,
mel_dim], 100 frames a second, log scale). Its tensors are read by `torch.load(weights_only=True)`
when speech is made; names and shapes come from here, by an unpickler that can build nothing else.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lowvram.config import DiTConfig
from lowvram.errors import CheckpointError

Array = npt.NDArray[Any]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""First number in a file saved without the zip container (torch/serialization.py)."""

_MAX_PICKLE_BYTES = 1 << 20


@dataclass(frozen=True)
class VoiceInfo:
    """What is known of a voice without reading its tensors."""

    name: str
    frames: int


def read_voice_infos(path: Path, config: DiTConfig) -> tuple[VoiceInfo, ...]:
    """The voices in the file, in its order, with their shapes checked.

    Raises:
        CheckpointError: a file that is missing, damaged, or holds anything but voices.
    """
    try:
        with path.open("rb") as file:
            content = _read_pickle(file)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; it holds the voices: download it again, or turn speech off"
        ) from None
    except Exception as error:  # A damaged pickle can raise anything at all.
        raise _damaged(path, str(error) or type(error).__name__) from error
    return tuple(_info(path, name, fields, config) for name, fields in _items(path, content))


def read_voices(path: Path, config: DiTConfig) -> dict[str, dict[str, Any]]:
    """The voices with their values, tensors on the CPU, as they stand in the file.

    Raises:
        CheckpointError: as `read_voice_infos`, or tensors that cannot be read.
    """
    infos = read_voice_infos(path, config)
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # As above: torch raises many kinds.
        raise _damaged(path, str(error).splitlines()[0]) from error
    return {info.name: content[info.name] for info in infos}


def write_voices(path: Path, voices: Mapping[str, Mapping[str, int | Array]]) -> None:
    """Write voices (whole numbers and float32 arrays) the way `torch.save` lays them out."""
    writer = _PickleWriter()
    content = writer.dictionary(
        {name: writer.dictionary(_encoded(writer, voice)) for name, voice in voices.items()}
    )
    files = {"data.pkl": b"\x80\x02" + content + b".", "byteorder": b"little", "version": b"3\n"}
    files |= {f"data/{index}": data for index, data in enumerate(writer.storages)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            # A fixed date: the same voices give the same bytes.
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/{name}", (1980, 1, 1, 0, 0, 0)), data)


def _encoded(writer: _PickleWriter, voice: Mapping[str, int | Array]) -> dict[str, bytes]:
    return {
        key: writer.integer(value) if isinstance(value, int) else writer.tensor(value)
        for key, value in voice.items()
    }


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({reason}); wanted voices saved by torch: download it again"
    )


@dataclass(frozen=True)
class _Tensor:
    """Stands for a tensor that was not read."""

    shape: tuple[int, ...]


def _rebuild(storage: object, offset: int, shape: tuple[int, ...], *rest: object) -> _Tensor:
    return _Tensor(tuple(shape))


class _Names(pickle.Unpickler):
    """Builds dictionaries, numbers and stand-ins for tensors; refuses every other class."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, key: object) -> object:
        return key


def _read_pickle(file: io.BufferedReader) -> object:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            if len(names) != 1 or archive.getinfo(names[0]).file_size > _MAX_PICKLE_BYTES:
                raise pickle.UnpicklingError("it is no file saved by torch")
            return _Names(io.BytesIO(archive.read(names[0]))).load()
    file.seek(0)
    # Without the container: magic number, version, a note on the machine, then the content.
    start = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
    if _Names(start).load() != _LEGACY_MAGIC:
        raise pickle.UnpicklingError("it is no file saved by torch")
    for _ in range(2):
        _Names(start).load()
    return _Names(start).load()


def _items(path: Path, content: object) -> list[tuple[str, Any]]:
    if not isinstance(content, dict) or not content:
        raise _damaged(path, "it holds no voices")
    return list(content.items())


def _info(path: Path, name: object, fields: object, config: DiTConfig) -> VoiceInfo:
    def refuse(problem: str) -> NoReturn:
        raise _damaged(path, f"voice {name!r} has {problem}")

    if not isinstance(name, str) or not isinstance(fields, dict):
        refuse("no fields")
    token, cond, mel = (fields.get(key) for key in ("bos_token", "cond", "ref_mel"))
    whole = isinstance(token, int) and not isinstance(token, bool) and token >= 0
    if not whole and not (isinstance(token, _Tensor) and math.prod(token.shape) == 1):
        refuse(f"bos_token {_shown(token)}, wanted a whole number")
    if not isinstance(cond, _Tensor) or cond.shape != (1, config.enc_emb_dim):
        refuse(f"cond {_shown(cond)}, wanted [1, {config.enc_emb_dim}]")
    if (
        not isinstance(mel, _Tensor)
        or len(mel.shape) != 3
        or mel.shape[::2] != (1, config.mel_dim)
        or mel.shape[1] < 1
    ):
        refuse(f"ref_mel {_shown(mel)}, wanted [1, frames, {config.mel_dim}]")
    return VoiceInfo(name, mel.shape[1])


def _shown(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, _Tensor) else repr(value)


class _PickleWriter:
    """The few protocol-2 opcodes that a dictionary of tensors needs, and the tensors' bytes."""

    def __init__(self) -> None:
        self.storages: list[bytes] = []

    def text(self, value: str) -> bytes:
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    def integer(self, value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def tuple(self, *values: bytes) -> bytes:
        return b"(" + b"".join(values) + b"t"

    def dictionary(self, items: Mapping[str, bytes]) -> bytes:
        return b"}(" + b"".join(self.text(key) + value for key, value in items.items()) + b"u"

    def tensor(self, array: Array) -> bytes:
        values = np.ascontiguousarray(array, dtype="<f4")
        key = self.text(str(len(self.storages)))
        self.storages.append(values.tobytes())
        storage = b"ctorch\nFloatStorage\n"
        count = self.integer(values.size)
        persistent = self.tuple(self.text("storage"), storage, key, self.text("cpu"), count) + b"Q"
        strides = (self.integer(stride // values.itemsize) for stride in values.strides)
        arguments = self.tuple(
            persistent,
            self.integer(0),
            self.tuple(*(self.integer(size) for size in values.shape)),
            self.tuple(*strides),
            b"\x89",  # requires_grad: False
            b"ccollections\nOrderedDict\n)R",  # no backward hooks
        )
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
