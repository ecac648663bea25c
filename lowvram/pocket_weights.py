"""Random weights of true structure, and the safetensors files that hold them.

Every tensor is drawn by itself from (seed, its name), so that the same seed gives the same float
weights whatever else the checkpoint holds and however it is cut into files; and by exact
arithmetic only (uniform numbers, products, rounding), so that every platform writes the same
bytes. Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lowvram.pocket_vocabulary import vocabulary_size, word_ids

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int32": "I32"}
"""Names as in `config.json` -> names as in a safetensors header."""

CODES = 8192
"""Codec tokens that stand for sound; the ids above are the Talker's own signs, never drawn."""


@dataclass(frozen=True)
class _Rule:
    """How tensors whose name matches are drawn: uniform about `mean` with spread `std`.

    `fan_in` divides the spread by the root of the inputs of one output.
    """

    pattern: str
    mean: float = 0.0
    std: float = 1.0
    fan_in: bool = False


_RULES = (
    _Rule(r"(norm\d?|ln_q|ln_post)\.weight$", mean=1.0, std=0.1),
    _Rule(r"embed_tokens\.weight$"),
    _Rule(r"codec_embed\.weight$"),
    _Rule(r"audio_bos_eos_token\.weight$"),
    # Far apart logits: greedy choices survive 16-bit rounding.
    _Rule(r"(lm_head|codec_head)\.weight$", std=4.0, fan_in=True),
    _Rule(r"act\.(alpha|beta)$", std=0.1),
    # A small share of the sum, so that 16-bit rounding stays within a hundredth of the logits.
    _Rule(r"model\..*\.down_proj\.weight$", std=0.5, fan_in=True),
    # Log-mel values lie around -4; the flow starts from noise around 0.
    _Rule(r"dit_model\.proj_out\.bias$", mean=-4.0, std=0.5),
    _Rule(r"bigvgan_model\.conv_post\.weight$", std=0.3, fan_in=True),
    _Rule(r"resblocks\..*\.weight$", std=0.4, fan_in=True),
    _Rule(r"\.bias$", std=0.1),
    _Rule(r"\.weight$", fan_in=True),
)


def draw(name: str, shape: Shape, seed: int) -> Array:
    """The float32 weights of one tensor.

    Raises:
        ValueError: a name for which there is no rule.
    """
    mean, std = distribution(name, shape)
    weights = noise(name, shape, seed) * np.float32(std) + np.float32(mean)
    return _shaped(name, weights)


def distribution(name: str, shape: Shape) -> tuple[float, float]:
    """Mean and spread of one tensor's weights.

    Raises:
        ValueError: a name for which there is no rule.
    """
    rule = next((rule for rule in _RULES if re.search(rule.pattern, name)), None)
    if rule is None:
        raise ValueError(f"no rule draws {name}")
    return rule.mean, rule.std / (math.sqrt(_fan_in(name, shape)) if rule.fan_in else 1.0)


def noise(name: str, shape: Shape, seed: int) -> Array:
    """Uniform float32 numbers of mean 0 and spread 1: those of this name and seed."""
    stream = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    # A uniform number of spread 1 lies within the root of 3.
    return (stream.random(shape, dtype=np.float32) * 2 - 1) * np.float32(math.sqrt(3))


def _fan_in(name: str, shape: Shape) -> int:
    """Inputs that one output sums. A transposed convolution of stride s sees 1/s of its kernel."""
    if ".ups." in name:
        return shape[0] * 2
    return math.prod(shape[1:])


def _shaped(name: str, weights: Array) -> Array:
    """Structure on top of noise, so that the built-in model says words and hums about zero."""
    if name == "thinker.lm_head.weight" and len(weights) >= vocabulary_size():
        quiet = np.full((len(weights), 1), 0.25, np.float32)
        quiet[list(word_ids())] = 1
        return weights * quiet
    if name == "talker.codec_head.weight":
        weights[CODES:] = 0
    if name.endswith("bigvgan_model.conv_post.weight"):
        # The activations before it are all positive: without a mean, no constant passes.
        weights -= weights.mean(axis=-1, keepdims=True)
    return weights


def to_bytes(values: Array, dtype: str) -> bytes:
    """Little-endian bytes of `values` in the type named as in `config.json`."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
        # Round to nearest, ties to even.
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    kinds = {"float16": "<f2", "float32": "<f4", "int32": "<i4"}
    return np.ascontiguousarray(values, dtype=kinds[dtype]).tobytes()


@dataclass(frozen=True)
class Stored:
    """One tensor as it goes into a file: type (as in `config.json`), shape, and its bytes, made
    when they are written: a checkpoint need not fit into memory."""

    dtype: str
    shape: Shape
    data: Callable[[], bytes]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (2 if self.dtype in ("bfloat16", "float16") else 4)


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """One safetensors file: header length, JSON header padded to 8 bytes, then the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        file.writelines(tensor.data() for tensor in tensors.values())


def write_checkpoint(folder: Path, tensors: Mapping[str, Stored], shards: int) -> None:
    """`model.safetensors`, or `shards` files of about equal size and the index that names them."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    total = sum(tensor.nbytes for tensor in tensors.values())
    pieces: list[dict[str, Stored]] = [{} for _ in range(shards)]
    done = 0
    for name, tensor in tensors.items():
        pieces[min(done * shards // total, shards - 1)][name] = tensor
        done += tensor.nbytes
    where: dict[str, str] = {}
    for index, piece in enumerate(pieces, start=1):
        file = f"model-{index:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file, piece)
        where |= dict.fromkeys(piece, file)
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": where},
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def names_of(tensors: Iterable[str]) -> list[str]:
    """Names in the order they are written: by part, then by layer number."""
    return sorted(tensors, key=lambda name: [_key(piece) for piece in name.split(".")])


def _key(piece: str) -> tuple[int, int, str]:
    return (0, int(piece), "") if piece.isdigit() else (1, 0, piece)
