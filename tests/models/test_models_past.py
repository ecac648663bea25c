"""Mel frames piece by piece: that a piece goes on as if all before it were there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_speech import tiny_codes, tiny_noise, tiny_token2wav, tiny_voice
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lowvram.models.token2wav import Token2Wav, Utterance
from lowvram.settings import Solver

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
        parts.append(model.mel(utterance, codes[start:stop], window, past, None if last else final))
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


def official(model: Token2Wav, utterance: Utterance, codes: list[int], noise: Tensor) -> Tensor:
    """Windows of 24 codes before, 48 new and 12 after, recomputed from noise each time."""
    parts, done = [], 0
    while done < len(codes):
        start = max(0, done - 24)
        last = len(codes) - done < 60
        stop = len(codes) if last else done + 60
        mel = model.mel(utterance, codes[start:stop], noise[2 * start : 2 * stop])
        keep = len(codes) if last else done + 48
        parts.append(mel[2 * (done - start) : 2 * (keep - start)])
        done = keep
    return torch.cat(parts)


def test_more_look_ahead_is_closer_and_the_default_no_worse_than_the_official_windows() -> None:
    """In the published pattern of layers, with half the evaluations."""
    model = deep(seed=3, std=0.15)
    utterance = model.prepare(tiny_voice(), "euler", 6)
    codes, noise = tiny_codes(130), tiny_noise(130)
    whole = model.mel(utterance, codes, noise)
    errors = [
        relative_error(in_pieces(model, utterance, codes, noise, (4,), ahead), whole)
        for ahead in (1, 2, 3)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[0] <= 1.05 * relative_error(official(model, utterance, codes, noise), whole)


def deep(seed: int, std: float) -> Token2Wav:
    return tiny_token2wav(
        seed,
        std,
        num_hidden_layers=22,
        look_ahead_layers=[10],
        look_backward_layers=[0, 20],
    )


def test_what_is_kept_of_the_past_is_needed() -> None:
    """Each layer and branch: without one of them the pieces are no longer the whole."""
    model = tiny_token2wav(5)
    utterance = model.prepare(tiny_voice(), "euler", 4)
    codes, noise = tiny_codes(60), tiny_noise(60)
    whole = model.mel(utterance, codes, noise)

    def second(layer: int, branch: int) -> float:
        past = model.past(utterance)
        model.mel(utterance, codes, noise, past, final=24)
        for evaluation in range(3):
            past.neighbours(evaluation, None)[layer].kept[:, branch].zero_()
        mel = model.mel(utterance, codes[24:], noise[48:], past)
        return float((mel - whole[48:]).abs().max())

    for layer in (0, 1):
        for branch in (0, 1):
            assert second(layer, branch) > 1e-3


def test_work_of_a_piece_does_not_grow() -> None:
    model = tiny_token2wav(5)
    utterance = model.prepare(tiny_voice(), "euler", 4)
    past, noise = model.past(utterance), tiny_noise(60)
    counted = []
    for _ in range(5):
        with FlopCounterMode(display=False) as flops:
            model.mel(utterance, [7] * 60, noise, past, final=48)
        counted.append(flops.get_total_flops())
    assert counted[1:] == [counted[1]] * 4
    assert counted[0] <= counted[1] <= 1.02 * counted[0]
