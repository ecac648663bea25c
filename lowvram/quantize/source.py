"""What may be quantized: the source's headers checked, and a digest that tells it from others.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowvram.checkpoint import Checkpoint
from lowvram.errors import CheckpointError, UsageError
from lowvram.offload import TensorInfo
from lowvram.tensors import AWQ_PACK, thinker_linears

_PROBES, _PROBE_BYTES = 64, 4096
"""Pieces of each file that the digest reads, spread evenly: it must not take a pass over 22 GB."""

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".lock")
_REPLACED = ("config.json", "model.safetensors.index.json", "quant_config.json", "manifest.json")

_EXPONENTS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}
"""Stored types, as integers, and the bits that are all set in NaN and infinity only."""


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint that can be quantized: `linears` by decoder layer, and all that stays."""

    checkpoint: Checkpoint
    group_size: int
    linears: Mapping[str, tuple[int, int, bool]]

    @property
    def layers(self) -> int:
        return self.checkpoint.config.thinker.text.num_hidden_layers

    def layer_prefix(self, layer: int) -> str:
        return f"thinker.model.layers.{layer}."

    def layer_tensors(self, layer: int) -> list[TensorInfo]:
        """The stored tensors of one decoder layer."""
        prefix = self.layer_prefix(layer)
        store = self.checkpoint.store
        return [store.info(name) for name in store.names() if name.startswith(prefix)]

    def other_tensors(self) -> list[TensorInfo]:
        """Every stored tensor that is copied as it is."""
        store = self.checkpoint.store
        prefixes = tuple(self.layer_prefix(layer) for layer in range(self.layers))
        return [store.info(name) for name in store.names() if not name.startswith(prefixes)]

    def packed_bytes(self, layer: int) -> int:
        """Bytes of a layer once its linears are packed."""
        total = 0
        for info in self.layer_tensors(layer):
            linear, _, kind = info.name.rpartition(".")
            if kind == "weight" and linear in self.linears:
                inputs, outputs, _ = self.linears[linear]
                total += inputs * outputs // 2
                total += inputs // self.group_size * (outputs // 2 + 2 * outputs)
            else:
                total += info.nbytes
        return total

    def side_files(self) -> list[Path]:
        """Tokenizer, processor files, voices, licence: everything that is no weight."""
        return sorted(
            path
            for path in self.checkpoint.folder.iterdir()
            if path.is_file()
            and path.suffix not in _WEIGHTS
            and path.name not in _REPLACED
            and not path.name.startswith(".")
        )

    def digest(self) -> str:
        """Tells this source from any other: headers, sizes, pieces of the data, `config.json`."""
        digest = hashlib.sha256((self.checkpoint.folder / "config.json").read_bytes())
        files = {info.file for info in map(self.checkpoint.store.info, self._names)}
        for path in sorted(files):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                digest.update(file.read(length))
                rest = path.stat().st_size - file.tell()
                start = file.tell()
                for probe in range(_PROBES):
                    file.seek(start + rest * probe // _PROBES)
                    digest.update(file.read(_PROBE_BYTES))
        for path in self.side_files():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        return digest.hexdigest()

    @property
    def _names(self) -> tuple[str, ...]:
        return self.checkpoint.store.names()


def check_source(checkpoint: Checkpoint, group_size: int) -> Source:
    """The checkpoint as something to quantize.

    Raises:
        CheckpointError: it is quantized already, its weights are tied, tensors are missing or of
            the wrong shape, or there is no layer to quantize.
        UsageError: groups of that size do not divide the linears.
    """
    config, name = checkpoint.config, checkpoint.name
    if config.quant is not None or any(map(checkpoint.quantized, thinker_linears(config.thinker))):
        raise CheckpointError(
            f"{name} is quantized already; wanted the 16- or 32-bit checkpoint it was made from"
        )
    if _tied(checkpoint.raw):
        raise CheckpointError(
            f"{name} has tied weights (tie_word_embeddings); wanted a Qwen2.5-Omni checkpoint with "
            "an lm_head of its own"
        )
    checkpoint.verify(speech=config.speaks)
    linears = thinker_linears(config.thinker)
    if not linears:
        raise CheckpointError(f"{name} has no decoder layer: there is nothing to quantize")
    for linear, (inputs, outputs, _) in linears.items():
        if inputs % group_size or outputs % AWQ_PACK:
            fitting = [str(g) for g in (32, 64, 128) if inputs % g == 0]
            raise UsageError(
                f"{linear} has {inputs} inputs and {outputs} outputs, which groups of {group_size} "
                f"do not divide; wanted --group-size {' or '.join(fitting) or '(none would do)'}"
            )
    return Source(checkpoint, group_size, linears)


def check_places(source: Path, destination: Path) -> None:
    """Refuse a destination that is in the source, or that holds it.

    Raises:
        UsageError: naming both.
    """
    inside, outside = source.resolve(), destination.resolve()
    if inside == outside or inside in outside.parents or outside in inside.parents:
        raise UsageError(
            f"{destination} and the source {source} lie within each other; wanted a folder of its "
            "own for the result"
        )


def refuse_nan(info: TensorInfo, piece: bytes | bytearray | memoryview) -> None:
    """Refuse stored bytes that hold a number which is none, or is endless.

    Raises:
        CheckpointError: naming the tensor.
    """
    if info.dtype not in _EXPONENTS:
        return
    kind, mask = _EXPONENTS[info.dtype]
    if bool(((np.frombuffer(piece, kind) & mask) == mask).any()):
        raise CheckpointError(
            f"{info.name} in {info.file} holds NaN or infinity; wanted finite weights: "
            "download the checkpoint again"
        )


def _tied(raw: Mapping[str, Any]) -> bool:
    thinker = raw.get("thinker_config") or {}
    places = (raw, thinker, thinker.get("text_config") or {})
    return any(place.get("tie_word_embeddings") for place in places)
