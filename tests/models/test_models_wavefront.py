"""The exact mode: an utterance in pieces, each evaluation once, equal to the whole one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_speech import speech_config, tiny_codes, tiny_token2wav, tiny_voice
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lowvram.config import OmniConfig
from lowvram.errors import CheckpointError
from lowvram.models.token2wav import Token2Wav, Utterance
from lowvram.settings import Solver

LAYERS: dict[str, dict[str, Any]] = {
    "as published": {},
    "two ahead, one both ways": {
        "block_size": 8,
        "look_ahead_layers": [1, 2],
        "look_backward_layers": [0, 2],
    },
    "at both ends": {"look_ahead_layers": [0, 3], "look_backward_layers": [0, 1, 2, 3]},
    "ahead after the last": {"look_ahead_layers": [3, 0, 2], "look_backward_layers": [1]},
    "no neighbours": {"look_ahead_layers": [], "look_backward_layers": []},
    "three frames a code": {
        "repeats": 3,
        "block_size": 6,
        "look_ahead_layers": [1],
        "look_backward_layers": [2],
    },
}


def noise_of(model: Token2Wav, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(model.repeats * count, 80, generator=generator)


def advanced(
    model: Token2Wav, utterance: Utterance, codes: list[int], noise: Tensor, blocks: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """The mel in pieces of so many blocks, the last number repeated; the frames of each piece."""
    size = model.code2wav_dit_model.config.codes_per_block
    front, parts, came = model.wavefront(utterance), [], 0
    with torch.inference_mode():
        while sum(map(len, parts)) < len(noise):
            step = blocks[min(len(parts), len(blocks) - 1)]
            new = codes[came : came + step * size]
            frames = slice(came * model.repeats, (came + len(new)) * model.repeats)
            parts.append(front.advance(new, noise[frames], step).clone())
            came += len(new)
    return torch.cat(parts), [len(part) for part in parts]


def difference(one: Tensor, other: Tensor) -> float:
    """The largest, in standard deviations."""
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.std())


@pytest.mark.parametrize("dit", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("count", [1, 11, 12, 13, 24, 25, 37, 100, 211])
def test_it_is_the_whole_utterance(dit: dict[str, Any], count: int) -> None:
    draw = random.Random(f"{sorted(dit)} {count}")
    model = tiny_token2wav(draw.randrange(1000), **dit)
    utterance = model.prepare(tiny_voice(), "euler", 4)
    codes, noise = tiny_codes(count), noise_of(model, count)
    whole = model.mel(utterance, codes, noise)
    for _ in range(2):
        blocks = [draw.randint(1, 6) for _ in range(draw.randint(1, 4))]
        mel, _ = advanced(model, utterance, codes, noise, blocks)
        assert difference(mel, whole) < 1e-5, blocks


@pytest.mark.parametrize(("solver", "points"), [("euler", 10), ("rk4", 10), ("rk4", 2)])
def test_it_is_the_whole_for_both_solvers(solver: Solver, points: int) -> None:
    model = tiny_token2wav(8, std=0.12)
    utterance = model.prepare(tiny_voice(), solver, points)
    codes, noise = tiny_codes(150), noise_of(model, 150)
    mel, _ = advanced(model, utterance, codes, noise, (3,))
    assert difference(mel, model.mel(utterance, codes, noise)) < 1e-4


def test_it_is_as_many_blocks_behind_as_there_are_evaluations() -> None:
    """Of a block of 24 frames, and twice as many where two layers look ahead."""
    for layers, behind in (([2], 4), ([0, 2], 8)):
        model = tiny_token2wav(5, look_ahead_layers=layers)
        utterance = model.prepare(tiny_voice(), "euler", 5)
        _, pieces = advanced(model, utterance, [1] * 150, noise_of(model, 150), (1,))
        assert pieces == [0] * behind + [24] * 12 + [12]


def test_it_does_the_work_of_the_whole_and_no_more() -> None:
    """But for keys and values of the block that waits; two layers of eight look ahead here."""
    config = OmniConfig.from_dict(speech_config(look_ahead_layers=[0, 3], num_hidden_layers=8))
    with torch.device("meta"):
        model = Token2Wav(config)
    utterance = model.prepare(tiny_voice(), "euler", 4)
    codes, noise = tiny_codes(300), noise_of(model, 300)
    counted = []
    for work in (
        lambda: model.mel(utterance, codes, noise),
        lambda: advanced(model, utterance, codes, noise, (2, 2, 4, 8)),
    ):
        with FlopCounterMode(display=False) as flops:
            work()
        counted.append(flops.get_total_flops())
    assert counted[0] < counted[1] <= 1.03 * counted[0]


@pytest.mark.parametrize(
    ("dit", "said"),
    [
        ({"look_ahead_layers": [2, 2]}, r"look_ahead_layers are \[2, 2\].*its 4 layers"),
        ({"look_backward_layers": [0, 20]}, r"look_backward_layers are \[0, 20\]"),
        ({"block_size": 25}, "block_size is 25 and repeats 2"),
    ],
)
def test_layers_that_are_not_there_are_refused(dit: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        tiny_token2wav(1, **dit)
