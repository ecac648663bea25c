"""Random models in files, of a size that computes in no time, and conversations with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from properties.random_shapes import Heads, Shapes

from lowvram.pocket import make_checkpoint, pocket_config

PIXELS = 28


def write(shapes: Shapes, folder: Path) -> Path:
    """A checkpoint of those shapes, with the vocabulary of the built-in model."""
    raw, own = pocket_config(), shapes.to_config()
    thinker, drawn = raw["thinker_config"], own["thinker_config"]
    del drawn["text_config"]["vocab_size"]
    thinker["text_config"] |= drawn["text_config"]
    thinker |= {tower: drawn[tower] for tower in ("vision_config", "audio_config")}
    ids = ("vocab_size", "_id", "_index", "model_type")
    talker = {k: v for k, v in own["talker_config"].items() if not k.endswith(ids)}
    raw["talker_config"] |= talker
    raw["token2wav_config"] = own["token2wav_config"]
    return make_checkpoint(
        folder,
        awq=bool(shapes.group),
        group_size=shapes.group or 128,
        dtype=shapes.dtype,
        config=raw,
    )


@st.composite
def small_models(draw: st.DrawFn) -> Shapes:
    """Of a few hundred thousand weights."""
    group = draw(st.sampled_from([0, 32, 64, 128]))
    step = max(group, 32)
    kv, each, dim = draw(st.tuples(st.integers(1, 2), st.integers(1, 4), st.sampled_from([16, 32])))
    while group and kv * each * dim % group:
        each += 1
    return Shapes(
        width=step * draw(st.integers(1, 256 // step)),
        inner=step * draw(st.integers(1, 512 // step)),
        vocabulary=512,
        text=Heads(draw(st.integers(1, 5)), kv, each, dim),
        talker_width=32 * draw(st.integers(1, 4)),
        talker_inner=32 * draw(st.integers(1, 6)),
        talker=Heads(draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 3)), 16),
        vision=(draw(st.integers(1, 3)), draw(st.integers(1, 3)), 16, 64),
        audio=(draw(st.integers(1, 3)), draw(st.integers(1, 3)), 16, 96),
        dit=(draw(st.integers(3, 4)), draw(st.integers(1, 4)), 16),
        vocoder=(1, (6, 5, 4, 2)),
        voice_frames=96,
        dtype="float16" if group else draw(st.sampled_from(["bfloat16", "float32"])),
        group=group,
    )


@dataclass(frozen=True)
class Talk:
    """A conversation of one message with media of those sizes, and its request's options."""

    image: tuple[int, int] | None
    sound: int | None
    words: int
    options: dict[str, Any]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Media are plain: only sizes matter."""
        content: list[dict[str, Any]] = []
        if self.image is not None:
            image = np.full((*self.image, 3), 90, np.uint8)
            content.append({"type": "image", "image": image})
        if self.sound is not None:
            sound = np.sin(np.arange(self.sound) / 9).astype(np.float32)
            content.append({"type": "audio", "audio": sound})
        content.append({"type": "text", "text": "Say more. " * self.words})
        return [{"role": "user", "content": content}]


@st.composite
def talks(draw: st.DrawFn) -> Talk:
    side = st.integers(2, 5).map(lambda cells: cells * PIXELS)
    return Talk(
        image=draw(st.none() | st.tuples(side, side)),
        sound=draw(st.none() | st.integers(1600, 40_000)),
        words=draw(st.integers(1, 150)),
        options={
            "max_new_tokens": draw(st.integers(1, 6)),
            "max_speech_seconds": draw(st.integers(1, 40)) / 50,
            "return_audio": draw(st.booleans()),
            "solver": draw(st.sampled_from(["euler", "rk4"])),
            "whole_speech": draw(st.booleans()),
        },
    )
