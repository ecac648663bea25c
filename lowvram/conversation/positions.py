"""TMRoPE: where each token of the prompt stands in time, height and width.

Text and sound count up by one on all three axes. An image or a pair of video frames spreads over
height and width; a video's time advances by its true seconds, 25 positions each (Qwen2.5-Omni
report, arXiv 2503.20215, section 2.2). A video that is heard alternates with its sound in chunks of
two seconds, both starting at the same position. The result equals `get_rope_index` of transformers
wherever that is defined; where some videos are heard and some are not, which it cannot express,
each video follows the rule of its own kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lowvram.config import ThinkerConfig
from lowvram.conversation.tokens import grid_tokens
from lowvram.errors import UsageError


@dataclass(frozen=True)
class Run:
    """Tokens that count up by one: text, and sound of its own."""

    tokens: int


@dataclass(frozen=True)
class Picture:
    """An image, or a video that is not heard. `grid`: patches in (time, height, width)."""

    grid: tuple[int, int, int]
    seconds_per_grid: float = 0.0


@dataclass(frozen=True)
class HeardVideo:
    """A video and its sound: one token before, both in alternating chunks, one token after."""

    grid: tuple[int, int, int]
    seconds_per_grid: float
    audio_tokens: int


Span = Run | Picture | HeardVideo


def positions(spans: Sequence[Span], config: ThinkerConfig) -> np.ndarray:
    """Positions int64 [3, T] of the tokens of `spans`, in order."""
    blocks = [np.zeros((3, 0), np.int64)]
    here = 0
    for span in spans:
        if isinstance(span, Run):
            block = _line(span.tokens) + here
            here += span.tokens
        elif isinstance(span, Picture):
            block = _picture(span, config) + here
            here = int(block.max()) + 1
        else:
            block, here = _heard_video(span, config, here)
        blocks.append(block)
    return np.concatenate(blocks, axis=1)


def chunks(span: HeardVideo, config: ThinkerConfig) -> Iterator[tuple[bool, slice]]:
    """A heard video's tokens in prompt order: (whether sound, which of the sound's or video's)."""
    length = int(config.position_id_per_seconds * config.seconds_per_chunk)
    seen = _cut(_times(span.grid, span.seconds_per_grid, config), length)
    heard = _cut(np.arange(span.audio_tokens), length)
    for i in range(max(len(seen), len(heard))):
        if i < len(seen):
            yield False, seen[i]
        if i < len(heard):
            yield True, heard[i]


def check_window(next_position: int, reply_tokens: int, limit: int) -> None:
    """Check that a reply of `reply_tokens`, beginning at `next_position`, stays in the window.

    `limit` is `max_position_embeddings`. Positions count, not tokens: a second of video or sound is
    25 positions however many tokens it takes.

    Raises:
        UsageError: it does not.
    """
    if next_position + reply_tokens > limit:
        raise UsageError(
            f"the prompt takes {next_position} positions and the reply up to {reply_tokens}, "
            f"together more than the model's window of {limit}; use shorter recordings or videos "
            "(25 positions a second), fewer turns, or a smaller max_new_tokens"
        )


def _line(tokens: int) -> np.ndarray:
    return np.broadcast_to(np.arange(tokens), (3, tokens))


def _times(grid: tuple[int, int, int], seconds: float, config: ThinkerConfig) -> np.ndarray:
    """Time of every token of a grid, in positions. In float32, as transformers computes it."""
    steps = np.arange(grid[0], dtype=np.float32) * np.float32(seconds)
    times = (steps * np.float32(config.position_id_per_seconds)).astype(np.int64)
    return np.repeat(times, grid_tokens((1, *grid[1:]), config.vision.spatial_merge_size))


def _picture(span: Picture | HeardVideo, config: ThinkerConfig) -> np.ndarray:
    merge = config.vision.spatial_merge_size
    time, height, width = span.grid[0], span.grid[1] // merge, span.grid[2] // merge
    rows, columns = np.indices((height, width)).reshape(2, -1)
    times = _times(span.grid, span.seconds_per_grid, config)
    return np.stack([times, np.tile(rows, time), np.tile(columns, time)])


def _heard_video(span: HeardVideo, config: ThinkerConfig, here: int) -> tuple[np.ndarray, int]:
    """The block, and the position of the token after it.

    The token that opens the sound shares its position with the one before it, which opens the
    video, and the token that closes the sound shares its own with the one after. That one stands
    after the last chunk, which need not hold the largest position.
    """
    sound, video = _line(span.audio_tokens) + here, _picture(span, config) + here
    parts = [(sound if heard else video)[:, part] for heard, part in chunks(span, config)]
    end = int(parts[-1].max()) + 1
    bounds = [np.full((3, 1), position, np.int64) for position in (here - 1, end)]
    return np.concatenate([bounds[0], *parts, bounds[1]], axis=1), end


def _cut(times: np.ndarray, length: int) -> list[slice]:
    """Runs of tokens whose times lie within successive stretches of `length` positions.

    A step over several stretches at once is made up one token at a time, as transformers does.
    """
    bounds = [0]
    for i, time in enumerate(times.tolist()):
        if time >= len(bounds) * length:
            bounds.append(i)
    return [slice(a, b) for a, b in zip(bounds, [*bounds[1:], len(times)], strict=True)]
