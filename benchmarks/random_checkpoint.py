"""A checkpoint of a known model's true shapes whose weights are made when they are read.

No file is written and no memory is taken for it: every read is answered from a few megabytes of
random numbers, repeated, of the spread that the tensor's name calls for.
"""

from __future__ import annotations

import math
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from lowvram.checkpoint import Checkpoint, GenerationDefaults
from lowvram.config import OmniConfig
from lowvram.conversation import Tokenizer
from lowvram.engine.voice import Voice
from lowvram.offload import Store, TensorInfo
from lowvram.pocket_weights import DTYPES, distribution, to_bytes
from lowvram.specs import SPECS, VOICE_FRAMES
from lowvram.tensors import expected_tensors, is_packed

FILE = Path("random")
PERIOD = 3_999_971
"""Values after which a tensor repeats: no multiple of any width, so that no two rows are equal."""

NIBBLES_STD = math.sqrt(2 * (16**2 - 1) / 12)
"""Spread of a weight minus its zero point, both any of 0 to 15."""

ITEM = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4}


class RandomStore(Store):
    """Answers as if one file held every tensor of `config`: packed ones as AutoAWQ stores them, all
    else in the config's type, and the vocoder in float32 unless the checkpoint is packed."""

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(FILE, [])
        self._groups = config.quant.group_size if config.quant else 0
        at = 0
        for name, shape in expected_tensors(config, lambda _: config.quant is not None).items():
            kind = self._kind(name, config)
            nbytes = math.prod(shape) * ITEM[kind]
            self._tensors[name] = TensorInfo(name, kind, shape, FILE, at, nbytes)
            at += nbytes
        self._order = list(self._tensors.values())
        self._starts = [info.offset for info in self._order]

    @staticmethod
    def _kind(name: str, config: OmniConfig) -> str:
        if config.quant is not None:
            return "I32" if is_packed(name) else "F16"
        return "F32" if name.startswith("token2wav.") else DTYPES[config.dtype]

    def read_run(self, info: TensorInfo, start: int, buffers: Sequence[memoryview]) -> None:
        at = info.offset + start
        for buffer in buffers:
            out = np.frombuffer(buffer, np.uint8)
            while len(out):
                tensor = self._order[bisect_right(self._starts, at) - 1]
                count = min(len(out), tensor.offset + tensor.nbytes - at)
                self._fill(tensor, at - tensor.offset, out[:count])
                out, at = out[count:], at + count
                with self._lock:
                    self.bytes_read += count

    def _fill(self, info: TensorInfo, start: int, out: np.ndarray) -> None:
        values = _values(info.dtype, *self._spread(info))
        begin = start + zlib.crc32(info.name.encode()) % PERIOD * ITEM[info.dtype]
        done = 0
        while done < len(out):
            piece = values[(begin + done) % len(values) :][: len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)

    def _spread(self, info: TensorInfo) -> tuple[float, float]:
        """Mean and spread of a tensor; of packed integers, which are any, nothing is asked."""
        if info.dtype == "I32":
            return 0.0, 1.0
        if info.name.endswith(".scales"):
            inputs = info.shape[0] * self._groups
            name = info.name.removesuffix("scales") + "weight"
            _, std = distribution(name, (info.shape[1], inputs))
            return std / NIBBLES_STD, 0.0
        return distribution(info.name, info.shape)


@lru_cache(maxsize=64)
def _values(kind: str, mean: float, std: float) -> np.ndarray:
    """Bytes of `PERIOD` stored values, uint8."""
    if kind == "I32":
        return np.frombuffer(np.random.default_rng(0).bytes(4 * PERIOD), np.uint8)
    dtype = next(name for name, stored in DTYPES.items() if stored == kind)
    stored = to_bytes(_uniform() * np.float32(std) + np.float32(mean), dtype)
    return np.frombuffer(stored, np.uint8)


@lru_cache(maxsize=1)
def _uniform() -> np.ndarray:
    """Numbers of mean 0 and spread 1."""
    drawn = np.random.default_rng(1).random(PERIOD, dtype=np.float32)
    return (drawn * 2 - 1) * np.float32(math.sqrt(3))


class RandomCheckpoint(Checkpoint):
    """What the engine asks of a checkpoint. Its replies end at the bounds that are asked for."""

    def __init__(self, name: str, config: OmniConfig) -> None:
        super().__init__(name=name, folder=Path(), raw={}, config=config, store=RandomStore(config))

    @classmethod
    def of(cls, name: str) -> RandomCheckpoint:
        """A known model, or the built-in one with packed linears (`pocket`)."""
        if name in SPECS:
            return cls(name, SPECS[name].config)
        from lowvram.pocket import pocket_config
        from lowvram.specs import AWQ

        raw = pocket_config() | {"quantization_config": AWQ, "torch_dtype": "float16"}
        return cls(name, OmniConfig.from_dict(raw))

    @property
    def voices(self) -> tuple[str, ...]:
        return ("any",)

    @property
    def voice_frames(self) -> int:
        return VOICE_FRAMES

    def load_voices(self) -> dict[str, Voice]:
        assert self.config.dit is not None
        drawn = torch.Generator().manual_seed(0)
        cond = torch.randn(1, self.config.dit.enc_emb_dim, generator=drawn)
        # Log-mel values of a recording lie around -4.
        mel = torch.randn(1, VOICE_FRAMES, self.config.dit.mel_dim, generator=drawn) - 4
        return {"any": Voice("any", 0, cond, mel)}

    @cached_property
    def generation(self) -> GenerationDefaults:
        return GenerationDefaults(eos_token_ids=(), codec_end_ids=())

    @cached_property
    def preprocessor(self) -> dict[str, Any]:
        return {}

    def tokenizer(self) -> Tokenizer:
        return cast(Tokenizer, Dots())


class Dots:
    """A tokenizer that writes a dot for every token."""

    def stream(self) -> Dots:
        return self

    def push(self, token: int) -> str:
        return "."

    def finish(self) -> str:
        return ""
