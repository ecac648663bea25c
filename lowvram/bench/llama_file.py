"""The same text model as llama.cpp reads it: a GGUF file of random weights, written in a stream.

Q4_0 linears and embedding, a Q8_0 head. The layout is version 3 of ggml's `docs/gguf.md`; names and
keys are those of its `qwen2` architecture. There is no vocabulary: tokens go in as numbers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowvram.config import DecoderConfig

ALIGNMENT = 32
POOL_BLOCKS = 1 << 16
"""Random blocks that a tensor repeats; only its bytes matter to the clock."""

LARGEST = 0.02
"""Magnitude that the largest integer of a block stands for."""

EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class Kind:
    """A ggml type: its number, values and bytes of a block, the largest integer it holds."""

    number: int
    block: int
    nbytes: int
    most: int


F32 = Kind(0, 1, 4, 0)
Q4_0 = Kind(2, 32, 18, 8)
Q8_0 = Kind(8, 32, 34, 127)


@dataclass(frozen=True)
class Tensor:
    """`shape` is in ggml's order, the inputs of a linear first."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.block * self.kind.nbytes


def tensors(text: DecoderConfig) -> list[Tensor]:
    """Every tensor of the file, in its order."""
    width, inner = text.hidden_size, text.intermediate_size
    q, kv = (n * text.head_dim for n in (text.num_attention_heads, text.num_key_value_heads))
    found = [Tensor(EMBEDDING, (width, text.vocab_size), Q4_0)]
    for i in range(text.num_hidden_layers):
        layer = f"blk.{i}"
        found.append(Tensor(f"{layer}.attn_norm.weight", (width,), F32))
        for name, outputs in (("q", q), ("k", kv), ("v", kv)):
            found.append(Tensor(f"{layer}.attn_{name}.weight", (width, outputs), Q4_0))
            found.append(Tensor(f"{layer}.attn_{name}.bias", (outputs,), F32))
        found.append(Tensor(f"{layer}.attn_output.weight", (q, width), Q4_0))
        found.append(Tensor(f"{layer}.ffn_norm.weight", (width,), F32))
        found.append(Tensor(f"{layer}.ffn_gate.weight", (width, inner), Q4_0))
        found.append(Tensor(f"{layer}.ffn_up.weight", (width, inner), Q4_0))
        found.append(Tensor(f"{layer}.ffn_down.weight", (inner, width), Q4_0))
    found.append(Tensor("output_norm.weight", (width,), F32))
    return [*found, Tensor("output.weight", (width, text.vocab_size), Q8_0)]


def write_gguf(path: Path, text: DecoderConfig) -> None:
    """Random weights at those shapes; norms are one, biases zero. Memory: a few MiB."""
    found, keys = tensors(text), _keys(text)
    infos, offset = bytearray(), 0
    for tensor in found:
        infos += _string(tensor.name) + struct.pack("<I", len(tensor.shape))
        infos += struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, tensor.kind.number, offset)
        offset += _aligned(tensor.nbytes)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(found), len(keys)) + b"".join(keys) + infos
    pools = {kind: _pool(kind) for kind in (Q4_0, Q8_0)}
    with path.open("wb") as file:
        file.write(header.ljust(_aligned(len(header)), b"\0"))
        for tensor in found:
            for piece in _pieces(tensor, pools):
                file.write(piece)
            file.write(bytes(_aligned(tensor.nbytes) - tensor.nbytes))


def _pieces(tensor: Tensor, pools: dict[Kind, bytes]) -> Iterator[bytes | memoryview]:
    if tensor.kind is F32:
        value = 0.0 if tensor.name.endswith("bias") else 1.0
        yield np.full(tensor.shape, value, "<f4").tobytes()
        return
    pool = memoryview(pools[tensor.kind])
    for start in range(0, tensor.nbytes, len(pool)):
        yield pool[: tensor.nbytes - start]


def _pool(kind: Kind) -> bytes:
    """Blocks of random integers, each after its float16 step."""
    blocks = np.random.default_rng(0).integers(0, 256, (POOL_BLOCKS, kind.nbytes), np.uint8)
    blocks[:, :2] = np.array([LARGEST / kind.most], "<f2").view(np.uint8)
    return blocks.tobytes()


def _keys(text: DecoderConfig) -> list[bytes]:
    words = {"general.architecture": "qwen2", "tokenizer.ggml.model": "no_vocab"}
    numbers: dict[str, int | float] = {
        "block_count": text.num_hidden_layers,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": text.rms_norm_eps,
        "rope.freq_base": text.rope_theta,
        "vocab_size": text.vocab_size,
    }
    keys = [_string(key) + struct.pack("<I", 8) + _string(word) for key, word in words.items()]
    for key, value in numbers.items():
        form, number = ("<If", 6) if isinstance(value, float) else ("<II", 4)
        keys.append(_string(f"qwen2.{key}") + struct.pack(form, number, value))
    return keys


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
