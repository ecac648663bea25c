"""A request of shapes alone: as long as the published case, laid out as a real one."""

from __future__ import annotations

import numpy as np
import pytest

from lowvram.bench.memory_request import (
    REPLY_CODES,
    TOKENS_PER_SECOND,
    ShapeCheckpoint,
    video_prompt,
)
from lowvram.conversation import check_window
from lowvram.engine.pieces import VocodeSettings
from lowvram.planner import config_facts
from lowvram.specs import SPECS

SPEC = SPECS["Qwen2.5-Omni-7B-AWQ"]


@pytest.mark.parametrize(
    ("seconds", "tokens"), [(15, 11_715), (30, 23_430), (60, 46_860), (1, 781)]
)
def test_a_prompt_is_as_long_as_the_published_one(seconds: int, tokens: int) -> None:
    thinker = SPEC.config.thinker
    prompt = video_prompt(thinker, seconds)
    shape = prompt.shape
    assert shape.tokens == tokens == seconds * TOKENS_PER_SECOND
    assert shape.grids[0][0] == seconds and shape.audio_frames == (100 * seconds,)
    assert prompt.positions.shape == (3, tokens)
    # Tokens are many, positions few: the window is kept.
    check_window(shape.next_position, 1024, thinker.text.max_position_embeddings)
    slots = np.sort(np.concatenate([prompt.vision[0].slots, prompt.audio[0].slots]))
    assert (slots == np.arange(tokens)).all()
    assert prompt.vision[0].patches(0).shape == (54 * 56, thinker.vision.patch_values)


def test_the_reply_ends_after_the_longest_piece_of_speech() -> None:
    assert SPEC.config.dit is not None
    longest = VocodeSettings().largest_pass(4096, SPEC.config.dit)
    assert VocodeSettings().largest_pass(REPLY_CODES, SPEC.config.dit) == longest
    ends = ShapeCheckpoint("any", SPEC.config).generation
    assert [0 in ends.codec_end_ids for _ in range(REPLY_CODES + 2)].index(True) == REPLY_CODES
    assert [7 in ends.eos_token_ids for _ in range(9)] == [False] * 5 + [True] * 4


def test_a_model_of_shapes_is_what_the_planner_sees() -> None:
    checkpoint, model = ShapeCheckpoint("any", SPEC.config), config_facts("any", SPEC.config)
    packed = {name for name in model.tensors if name.endswith(".qweight")}
    assert {name.rpartition(".")[0] for name in packed} == model.packed
    assert all(checkpoint.quantized(name) for name in model.packed)
    assert checkpoint.store.info(min(packed)).dtype == "I32"
    assert checkpoint.store.rows("thinker.model.embed_tokens.weight", [3, 9]).shape == (2, 3584)
