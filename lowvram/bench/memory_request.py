"""A request about a video of so many seconds, and a model, both of shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lowvram.checkpoint import Checkpoint, GenerationDefaults
from lowvram.config import OmniConfig, ThinkerConfig
from lowvram.conversation import AudioInput, Prompt, Tokenizer, VisionInput
from lowvram.conversation.pixels import PixelFormat
from lowvram.conversation.positions import HeardVideo, chunks, positions
from lowvram.engine.voice import Voice
from lowvram.offload import Store, TensorInfo
from lowvram.planner import Plan
from lowvram.tensors import Shape, expected_tensors, is_packed

GRID = (54, 56)
"""Patches of a frame pair: 756 tokens of the 768 that a pair of video frames may take."""

AUDIO_FRAMES = 100
"""Mel frames of a second, which become 25 tokens."""

TOKENS_PER_SECOND = 781
"""Of a video with its sound, one frame pair a second: 11,715 for the card's 15 s."""

REPLY_TOKENS, REPLY_CODES = 5, 204
"""Steps that are run: what a longer reply takes is allocated before the first one. Codes enough
for the first piece of speech that is as long as any, with what it looks ahead."""


def video_prompt(config: ThinkerConfig, seconds: int) -> Prompt:
    """A video and its sound, without any text: `TOKENS_PER_SECOND` tokens for every second."""
    span = HeardVideo((seconds, *GRID), 1.0, seconds * AUDIO_FRAMES // 4)
    # Without the two tokens around the sound.
    place = positions([span], config)[:, 1:-1]
    slots: dict[bool, list[np.ndarray]] = {False: [], True: []}
    done = 0
    for heard, part in chunks(span, config):
        count = part.stop - part.start
        slots[heard].append(np.arange(done, done + count))
        done += count
    features = np.zeros((config.audio.num_mel_bins, seconds * AUDIO_FRAMES), np.float32)
    return Prompt(
        ids=np.zeros(done, np.int64),
        positions=place,
        next_position=int(place.max()) + 1,
        vision=(_Blank.of(config, span.grid, np.concatenate(slots[False])),),
        audio=(AudioInput(features, np.concatenate(slots[True])),),
    )


class _Blank(VisionInput):
    """A video of which nothing is seen."""

    _patches: np.ndarray

    @classmethod
    def of(cls, config: ThinkerConfig, grid: tuple[int, int, int], slots: np.ndarray) -> _Blank:
        found = cls(grid, slots, np.zeros((0, 0, 0, 3), np.uint8), PixelFormat(), 1.0)
        blank = np.zeros((grid[1] * grid[2], config.vision.patch_values), np.float32)
        object.__setattr__(found, "_patches", blank)
        return found

    def patches(self, pair: int) -> np.ndarray:
        return self._patches


def blank_voice(config: OmniConfig, frames: int) -> Voice:
    """A voice with a reference of that many mel frames."""
    assert config.dit is not None
    cond = torch.zeros(1, config.dit.enc_emb_dim)
    return Voice("any", 0, cond, torch.zeros(1, frames, config.dit.mel_dim))


class ShapeCheckpoint(Checkpoint):
    """What the engine asks of a checkpoint, from its `config.json` alone."""

    def __init__(self, name: str, config: OmniConfig, reply_tokens: int = REPLY_TOKENS) -> None:
        self.reply_tokens = reply_tokens
        store = cast(Store, _ShapeStore(config))
        super().__init__(name=name, folder=Path(), raw={}, config=config, store=store)

    @cached_property
    def generation(self) -> GenerationDefaults:
        """Replies end after a few steps."""
        return GenerationDefaults(_EndsAfter(self.reply_tokens), _EndsAfter(REPLY_CODES))


def reply_tokens(plan: Plan) -> int:
    """Of a reply during which all is there at once that ever is: also where speech is made
    meanwhile."""
    return REPLY_CODES + 1 if plan.interleaves("decode", "talk") else REPLY_TOKENS


class _EndsAfter(tuple[int, ...]):
    """Ids that end a reply: none of the first `steps` that are asked for, then any."""

    _left: int

    def __new__(cls, steps: int) -> _EndsAfter:
        made = super().__new__(cls)
        made._left = steps
        return made

    def __contains__(self, token: object) -> bool:
        self._left -= 1
        return self._left < 0


class _ShapeStore:
    """Names, shapes and types of tensors, all of zeros."""

    def __init__(self, config: OmniConfig) -> None:
        packed = config.quant is not None
        self._shapes: dict[str, Shape] = expected_tensors(config, lambda linear: packed)
        self._type = {"float32": "F32", "float16": "F16"}.get(config.dtype, "BF16")

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def has(self, name: str) -> bool:
        return name in self._shapes

    def info(self, name: str) -> TensorInfo:
        kind = "I32" if is_packed(name) else self._type
        return TensorInfo(name, kind, self._shapes[name], Path("config.json"), 0, 0)

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        return torch.zeros(len(indices), self._shapes[name][1])


class _NoWords:
    """A tokenizer whose tokens are all silent."""

    def stream(self) -> _NoWords:
        return self

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def no_words() -> Tokenizer:
    """Tokens of a model without a vocabulary."""
    return cast(Tokenizer, _NoWords())
