"""TMRoPE positions: against transformers, and where transformers has no answer of its own."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from conversation_files import thinker_config
from conversation_oracle import rope_index

from lowvram.conversation import check_window
from lowvram.conversation.positions import HeardVideo, Picture, Run, chunks, positions
from lowvram.conversation.prompt import MediaShape, _Page
from lowvram.conversation.tokens import audio_tokens, grid_tokens
from lowvram.errors import UsageError

CONFIG = thinker_config()
TEXT = 7


def write(shapes: list[MediaShape], rng: random.Random) -> Any:
    """A prompt of these media, each between the tokens that the chat template puts around it."""
    page = _Page(CONFIG)
    for shape in shapes:
        page.write([TEXT] * rng.randint(0, 5))
        heard = shape.kind == "audio"
        start = CONFIG.audio_start_token_id if heard else CONFIG.vision_start_token_id
        end = CONFIG.audio_end_token_id if heard else CONFIG.vision_end_token_id
        page.write([start])
        page.place(shape)
        page.write([end])
    page.write([TEXT] * rng.randint(1, 5))
    return page.layout()


def random_shape(rng: random.Random, heard: bool) -> MediaShape:
    kind = rng.choice(["image", "audio", "video"])
    side = (2 * rng.randint(1, 9), 2 * rng.randint(1, 9))
    if kind == "image":
        return MediaShape("image", (1, *side))
    frames = rng.randint(3, 1200)
    if kind == "audio":
        return MediaShape("audio", audio_frames=frames)
    seconds = rng.choice([1.0, 1.0, 2 / 3, 0.4, 1.0201, 2.0, 3.7, 5.0])
    grid = (rng.randint(1, 14), *side)
    return MediaShape("video", grid, frames if heard else None, seconds)


def media_arguments(shapes: list[MediaShape], heard: bool) -> dict[str, Any]:
    images = [s.grid for s in shapes if s.kind == "image"]
    videos = [s for s in shapes if s.kind == "video"]
    sounds = [s.audio_frames for s in shapes if s.audio_frames is not None]
    return {
        "image_grid_thw": torch.tensor(images) if images else None,
        "video_grid_thw": torch.tensor([s.grid for s in videos]) if videos else None,
        "second_per_grids": torch.tensor([s.seconds_per_grid for s in videos]) if videos else None,
        "audio_seqlens": torch.tensor(sounds) if sounds else None,
        "use_audio_in_video": heard,
    }


@pytest.mark.oracle
@pytest.mark.parametrize("heard", [False, True])
def test_positions_of_random_mixtures_are_those_of_transformers(heard: bool) -> None:
    rng = random.Random(5 + heard)
    seen = set()
    for _ in range(120):
        shapes = [random_shape(rng, heard) for _ in range(rng.randint(1, 6))]
        layout = write(shapes, rng)
        theirs = rope_index(CONFIG, layout.ids, **media_arguments(shapes, heard))
        np.testing.assert_array_equal(layout.positions, theirs)
        seen |= {shape.kind for shape in shapes}
    assert seen == {"image", "audio", "video"}


def test_text_counts_up_on_all_axes() -> None:
    np.testing.assert_array_equal(
        positions([Run(3), Run(2)], CONFIG), np.arange(5)[None].repeat(3, 0)
    )


def test_an_image_spreads_over_height_and_width() -> None:
    found = positions([Run(2), Picture((1, 4, 6)), Run(1)], CONFIG)
    assert found[:, 2:8].tolist() == [
        [2, 2, 2, 2, 2, 2],
        [2, 2, 2, 3, 3, 3],
        [2, 3, 4, 2, 3, 4],
    ]
    assert found[:, 8].tolist() == [5, 5, 5]


def test_videos_with_and_without_sound_each_follow_their_own_rule() -> None:
    """transformers has one switch for all videos; alone, each must stand as it does there."""
    silent, heard = (3, 4, 4), HeardVideo((3, 4, 4), 1.0, 60)
    together = positions([Run(2), Picture(silent, 1.0), Run(3), heard, Run(2)], CONFIG)
    alone = positions([Run(2), Picture(silent, 1.0)], CONFIG)
    np.testing.assert_array_equal(together[:, : alone.shape[1]], alone)
    rest = positions([Run(3), heard, Run(2)], CONFIG) + int(alone.max()) + 1
    np.testing.assert_array_equal(together[:, alone.shape[1] :], rest)


def test_a_heard_video_alternates_every_two_seconds() -> None:
    span = HeardVideo((5, 2, 4), 1.0, 130)  # 2 tokens a second of pictures, 25 of sound
    order = [(heard, part.stop - part.start) for heard, part in chunks(span, CONFIG)]
    assert order == [(False, 4), (True, 50), (False, 4), (True, 50), (False, 2), (True, 30)]
    assert sum(n for heard, n in order if heard) == 130
    assert sum(n for heard, n in order if not heard) == grid_tokens(span.grid, 2)


def test_sound_and_picture_of_one_moment_stand_at_one_time() -> None:
    span = HeardVideo((4, 2, 2), 1.0, 100)
    found = positions([Run(1), span, Run(1)], CONFIG)[0]
    assert found[:2].tolist() == [0, 0]  # the video's opening token and the sound's share a place
    assert found[2:4].tolist() == [1, 26]  # pictures of seconds 0 and 1
    assert found[4:54].tolist() == list(range(1, 51))
    assert found[54:56].tolist() == [51, 76]
    assert found[-2:].tolist() == [101, 101]


@pytest.mark.parametrize(
    ("frames", "tokens"), [(1, 0), (2, 0), (3, 1), (4, 1), (200, 50), (201, 50), (30_000, 7500)]
)
def test_audio_tokens(frames: int, tokens: int) -> None:
    assert audio_tokens(frames) == tokens


def test_the_window_is_counted_in_positions() -> None:
    check_window(next_position=1600, reply_tokens=1024, limit=2624)
    with pytest.raises(UsageError, match=r"1600 positions.*1025.*window of 2624.*max_new_tokens"):
        check_window(next_position=1600, reply_tokens=1025, limit=2624)


def test_a_minute_of_video_takes_few_positions() -> None:
    """60 s at 2 frames/s, 768 tokens a pair with sound: 47 thousand tokens, 1.6 thousand
    positions."""
    span = HeardVideo((60, 48, 64), 1.0, 1500)
    found = positions([Run(40), span, Run(20)], CONFIG)
    assert found.shape == (3, 40 + 60 * 768 + 1500 + 2 + 20)
    assert found.max() + 1 < 1600
