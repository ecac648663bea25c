"""Mel frames piece by piece: that a piece goes on as if all before it were there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny_speech import tiny_codes, tiny_noise, tiny_token2wav, tiny_voice
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lowvram.models.past import Neighbour
from lowvram.models.token2wav import Token2Wav, Utterance
from lowvram.settings import Solver

Mel = Callable[[list[int], Tensor], Tensor]

BOTH_WAYS: dict[str, Any] = {
    "block_size": 8,
    "look_ahead_layers": [1, 2],
    "look_backward_layers": [0, 2],
}


def in_pieces(
    model: Token2Wav,
    utterance: Utterance,
    codes: list[int],
    noise: Tensor,
    blocks: Sequence[int],
    ahead: int,
) -> Tensor:
    """Pieces of so many blocks, the last number repeated, each with `ahead` blocks after it."""
    size = model.code2wav_dit_model.config.codes_per_block
    past, parts, start, index = model.past(utterance), [], 0, 0
    while start < len(codes):
        final = blocks[min(index, len(blocks) - 1)] * size
        stop = start + final + ahead * size
        last = stop >= len(codes)
        window = noise[start * model.repeats : stop * model.repeats]
        parts.append(
            model.mel(utterance, codes[start:stop], window, past, None if last else final)
        )
        start, index = len(codes) if last else start + final, index + 1
    return torch.cat(parts)


def relative_error(mel: Tensor, wanted: Tensor) -> float:
    return float((mel - wanted).square().mean().sqrt() / wanted.std())


@pytest.mark.parametrize("dit", [{}, BOTH_WAYS], ids=["as published", "both ways at once"])
@pytest.mark.parametrize("blocks", [(1,), (2, 2, 4, 8), (3,)])
@pytest.mark.parametrize("count", [7, 120, 133, 167])
def test_with_a_block_ahead_for_each_evaluation_pieces_are_the_whole(
    dit: dict[str, Any], blocks: tuple[int, ...], count: int
) -> None:
    model = tiny_token2wav(5, **dit)
    utterance = model.prepare(tiny_voice(), "euler", 5)
    codes, noise = tiny_codes(count), tiny_noise(count)
    whole = model.mel(utterance, codes, noise)
    pieces = in_pieces(model, utterance, codes, noise, blocks, ahead=4)
    assert pieces.shape == whole.shape and whole.std() > 0.3
    assert (pieces - whole).abs().max() < 1e-5 * whole.std()


@pytest.mark.parametrize(("solver", "points", "ahead"), [("euler", 10, 9), ("rk4", 3, 8)])
def test_pieces_are_the_whole_for_both_solvers(solver: Solver, points: int, ahead: int) -> None:
    model = tiny_token2wav(6)
    utterance = model.prepare(tiny_voice(), solver, points)
    codes, noise = tiny_codes(200), tiny_noise(200)
    whole = model.mel(utterance, codes, noise)
    pieces = in_pieces(model, utterance, codes, noise, (2, 3), ahead)
    assert (pieces - whole).abs().max() < 1e-5 * whole.std()
