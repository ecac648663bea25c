"""Models and requests drawn at random, of shapes alone. What is drawn prints as Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tiny import tiny_config

from lowvram.config import OmniConfig
from lowvram.conversation import AudioInput, Prompt, VisionInput
from lowvram.conversation.pixels import PixelFormat
from lowvram.conversation.positions import HeardVideo, Picture, Run, Span, chunks, positions
from lowvram.conversation.tokens import audio_tokens
from lowvram.planner import ModelFacts, config_facts
from lowvram.settings import GenerationSettings
from lowvram.specs import AWQ, SPECS

RATES = ((5, 3, 2, 2, 2, 2), (6, 5, 4, 2), (10, 6, 4))
"""Of the vocoder: 240 samples a mel frame each."""


@dataclass(frozen=True)
class Heads:
    """Of a decoder: layers, key heads, query heads for each, and their width."""

    layers: int
    kv: int
    group: int
    dim: int

    def to_config(self) -> dict[str, Any]:
        half = self.dim // 2
        sections = [half // 4, 3 * half // 8, half - half // 4 - 3 * half // 8]
        return {
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.kv * self.group,
            "num_key_value_heads": self.kv,
            "head_dim": self.dim,
            "rope_scaling": {
                "mrope_section": sections,
                "rope_type": "default",
                "type": "default",
            },
        }


@dataclass(frozen=True)
class Shapes:
    """A model that nobody made. `group` is that of packed linears, 0 where none is packed."""

    width: int
    inner: int
    vocabulary: int
    text: Heads
    talker_width: int
    talker_inner: int
    talker: Heads
    vision: tuple[int, int, int, int]
    """Blocks, heads, their width, and the width of the MLP."""
    audio: tuple[int, int, int, int]
    """As of the vision tower."""
    dit: tuple[int, int, int]
    """Layers, heads, their width."""
    vocoder: tuple[int, tuple[int, ...]]
    """Channels that come out of it, and its rates."""
    voice_frames: int
    dtype: str
    group: int = 0

    def to_config(self) -> dict[str, Any]:
        """The `config.json` of such a model."""
        raw = tiny_config(
            hidden_size=self.width,
            intermediate_size=self.inner,
            vocab_size=self.vocabulary,
            **self.text.to_config(),
        )
        thinker, sound = raw["thinker_config"], raw["token2wav_config"]
        depth, heads, dim, inner = self.vision
        thinker["vision_config"] |= {
            "depth": depth,
            "num_heads": heads,
            "hidden_size": heads * dim,
            "intermediate_size": inner,
            "out_hidden_size": self.width,
            "fullatt_block_indexes": list(range(1, depth, 2)),
        }
        depth, heads, dim, inner = self.audio
        thinker["audio_config"] |= {
            "encoder_layers": depth,
            "encoder_attention_heads": heads,
            "d_model": heads * dim,
            "encoder_ffn_dim": inner,
            "output_dim": self.width,
        }
        raw["talker_config"] |= {
            "embedding_size": self.width,
            "hidden_size": self.talker_width,
            "intermediate_size": self.talker_inner,
            **self.talker.to_config(),
        }
        depth, heads, dim = self.dit
        sound["dit_config"] |= {
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "head_dim": dim,
            "hidden_size": heads * dim,
            "look_ahead_layers": [1],
            "look_backward_layers": [0, 2],
        }
        channels, rates = self.vocoder
        sound["bigvgan_config"] |= {
            "upsample_initial_channel": channels << len(rates),
            "upsample_rates": list(rates),
            "upsample_kernel_sizes": [2 * rate + rate % 2 for rate in rates],
        }
        raw["torch_dtype"] = self.dtype
        if self.group:
            raw["quantization_config"] = {**AWQ, "group_size": self.group}
        return raw

    @cached_property
    def facts(self) -> ModelFacts:
        """What a planner would be told of it."""
        made = config_facts("drawn", OmniConfig.from_dict(self.to_config()))
        return replace(made, voice_frames=self.voice_frames)


@dataclass(frozen=True)
class Known:
    """A published model, by name."""

    name: str

    @cached_property
    def facts(self) -> ModelFacts:
        return config_facts(self.name, SPECS[self.name].config)


Model = Shapes | Known


@dataclass(frozen=True)
class Asked:
    """A request: what is in its prompt, and its settings.

    In `media` an integer is that many tokens of text; one of two numbers is an image of so many
    cells of 28 pixels, one of three a video; a third number of frames and one more of mel frames is
    a video that is heard; a single mel count in a tuple is a recording.
    """

    media: tuple[int | tuple[int, ...], ...]
    tokens: int
    codes: int
    speech: bool = True
    solver: str = "euler"
    whole: bool = False

    @property
    def settings(self) -> GenerationSettings:
        return GenerationSettings(
            speech=self.speech,
            max_new_tokens=self.tokens,
            max_speech_seconds=self.codes / 50,
            solver=self.solver,  # type: ignore[arg-type]
            whole_speech=self.whole,
        )

    def prompt(self, facts: ModelFacts) -> Prompt:
        """Laid out as by a real conversation, with nothing in it."""
        config = facts.config.thinker
        spans = [_span(medium, config.vision.spatial_merge_size) for medium in self.media]
        place = positions(spans, config)
        vision, audio, here = [], [], 0
        for medium, span in zip(self.media, spans, strict=True):
            slots: dict[bool, np.ndarray] = {}
            length = _tokens(medium)
            if isinstance(span, HeardVideo):
                parts = [(heard, part.stop - part.start) for heard, part in chunks(span, config)]
                heard = np.repeat([one for one, _ in parts], [count for _, count in parts])
                slots = {kind: here + 1 + np.flatnonzero(heard == kind) for kind in (True, False)}
                length += 2
            elif isinstance(span, Picture):
                slots = {False: np.arange(here, here + length)}
            elif isinstance(medium, tuple):
                slots = {True: np.arange(here, here + length)}
            if False in slots:
                assert isinstance(span, Picture | HeardVideo)
                vision.append(_Blank(span.grid, slots[False], config.vision.patch_values))
            if True in slots:
                assert isinstance(medium, tuple)
                features = np.zeros((config.audio.num_mel_bins, medium[-1]), np.float32)
                audio.append(AudioInput(features, slots[True]))
            here += length
        return Prompt(
            ids=np.zeros(here, np.int64),
            positions=place,
            next_position=int(place.max()) + 1,
            vision=tuple(vision),
            audio=tuple(audio),
        )


def _tokens(medium: int | tuple[int, ...]) -> int:
    """Tokens of one medium, without those around it."""
    if isinstance(medium, int):
        return medium
    sound = audio_tokens(medium[-1]) if len(medium) in (1, 4) else 0
    seen = medium[:-1] if len(medium) in (1, 4) else medium
    return sound + (int(np.prod(seen)) if seen else 0)


def _span(medium: int | tuple[int, ...], merge: int) -> Span:
    if isinstance(medium, int) or len(medium) == 1:
        return Run(_tokens(medium))
    time = medium[0] if len(medium) > 2 else 1
    rows, columns = medium[1:3] if len(medium) > 2 else medium
    grid = (time, merge * rows, merge * columns)
    if len(medium) == 4:
        return HeardVideo(grid, 1.0, audio_tokens(medium[3]))
    return Picture(grid, 1.0)


class _Blank(VisionInput):
    """A video of which nothing is seen."""

    def __init__(self, grid: tuple[int, int, int], slots: np.ndarray, values: int) -> None:
        super().__init__(grid, slots, np.zeros((0, 0, 0, 3), np.uint8), PixelFormat(), 1.0)
        object.__setattr__(self, "_patches", np.zeros((grid[1] * grid[2], values), np.float32))

    _patches: np.ndarray

    def patches(self, pair: int) -> np.ndarray:
        return self._patches


def multiples(of: int, least: int, most: int) -> st.SearchStrategy[int]:
    """Multiples of a number between two of them."""
    return st.integers(-(-least // of), most // of).map(lambda count: count * of)


@st.composite
def heads(draw: st.DrawFn, dims: Sequence[int], group: int) -> Heads:
    """`group` divides the width of all query heads together."""
    dim = draw(st.sampled_from(dims))
    kv, each = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    while kv * each * dim % max(group, 1):
        each += 1
    return Heads(draw(st.integers(1, 7)), kv, each, dim)


@st.composite
def models(draw: st.DrawFn, packed: bool, scale: int = 1) -> Shapes:
    """Models of random widths, up to `scale` times small ones."""
    group = draw(st.sampled_from([32, 64, 128])) if packed else 0
    step = max(32, group)
    return Shapes(
        width=draw(multiples(step, step, 256 * scale)),
        inner=draw(multiples(step, step, 768 * scale)),
        vocabulary=draw(multiples(64, 512, 20_000 * scale)),
        text=draw(heads((16, 32, 64, 128), group)),
        talker_width=draw(multiples(32, 32, 192 * scale)),
        talker_inner=draw(multiples(32, 32, 384 * scale)),
        talker=draw(heads((16, 32, 64), 0)),
        vision=draw(_tower((16, 32, 80), 256 * scale)),
        audio=draw(_tower((16, 32, 64), 256 * scale)),
        dit=draw(st.tuples(st.integers(3, 5), st.integers(1, 4 * scale), st.just(32))),
        vocoder=(draw(st.integers(1, 2 * scale)), draw(st.sampled_from(RATES))),
        voice_frames=draw(st.integers(20, 500)),
        dtype="float16" if packed else draw(st.sampled_from(["bfloat16", "float32"])),
        group=group,
    )


def _tower(dims: Sequence[int], inner: int) -> st.SearchStrategy[tuple[int, int, int, int]]:
    width = st.sampled_from(dims)
    return st.tuples(st.integers(1, 4), st.integers(1, 4), width, multiples(4, 16, inner))


@st.composite
def requests(draw: st.DrawFn, longest: int = 20_000, codes: int = 300) -> Asked:
    """Prompts of up to `longest` tokens of text, and a few media."""
    side, frames = st.integers(1, 24), st.integers(3, 900)
    image, heard = st.tuples(side, side), st.tuples(frames)
    clips = st.integers(1, 12)
    medium = st.one_of(
        image,
        heard,
        st.tuples(clips, side, side),
        st.tuples(clips, side, side, st.integers(50, 1200)),
    )
    text = st.one_of(st.integers(1, 600), st.integers(1, longest))
    return Asked(
        media=(*draw(st.lists(medium, max_size=3)), draw(text)),
        tokens=draw(st.one_of(st.integers(1, 64), st.integers(1, 4096))),
        codes=draw(st.one_of(st.integers(1, 40), st.integers(1, 120), st.integers(1, codes))),
        speech=draw(st.booleans()),
        solver=draw(st.sampled_from(["euler", "rk4"])),
        whole=draw(st.booleans()),
    )
