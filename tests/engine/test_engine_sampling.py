"""Sampling: the same scores as transformers' processors, draws that follow, seeds that hold."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from allocations import Allocations

from lowvram.engine.sampling import Sampler
from lowvram.settings import SamplingSettings

HISTORY = [3, 3, 17, 40]
SUPPRESSED = [5, 6]


def logits(seed: int, size: int = 64) -> torch.Tensor:
    return torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(temperature=0.9, top_p=0.8, top_k=40, repetition_penalty=1.05),
        SamplingSettings(temperature=1.7, top_p=0.3),
        SamplingSettings(temperature=0.4, top_k=3, repetition_penalty=0.8),
        SamplingSettings(temperature=1.0, top_p=1e-6),
    ],
    ids=str,
)
def test_scores_are_those_of_transformers(seed: int, settings: SamplingSettings) -> None:
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    steps = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(settings.repetition_penalty),
            SuppressTokensLogitsProcessor(SUPPRESSED),
            TemperatureLogitsWarper(settings.temperature),
        ]
    )
    if settings.top_k:
        steps.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        steps.append(TopPLogitsWarper(settings.top_p))
    theirs = steps(torch.tensor([HISTORY]), logits(seed).clone())[0]
    sampler = Sampler(settings, seed=0, suppress=SUPPRESSED, history=HISTORY)
    torch.testing.assert_close(sampler.scores(logits(seed)[0]), theirs, rtol=0, atol=0)


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(SamplingSettings(temperature=1.0), seed=1)
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    drawn = Counter(sampler(probabilities.log()[None]) for _ in range(4000))
    for token, probability in enumerate(probabilities.tolist()):
        assert drawn[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_draws_are_those_of_multinomial() -> None:
    sampler = Sampler(SamplingSettings(temperature=0.7), seed=3)
    generator = torch.Generator().manual_seed(3)
    for step in range(50):
        chances = (logits(step)[0] / 0.7).softmax(0)
        assert sampler(logits(step)) == int(torch.multinomial(chances, 1, generator=generator))


DRAWING = [
    SamplingSettings(temperature=0.9, top_p=0.8, top_k=40, repetition_penalty=1.05),
    SamplingSettings(temperature=1.0),
    SamplingSettings(repetition_penalty=0.9),
    SamplingSettings(),
]


@pytest.mark.parametrize("settings", DRAWING, ids=str)
def test_drawing_where_the_logits_are_is_the_same_and_allocates_once(
    settings: SamplingSettings,
) -> None:
    called, kept = (
        Sampler(settings, seed=8, suppress=SUPPRESSED, history=HISTORY) for _ in range(2)
    )
    noise = torch.empty(64)
    for step in range(40):
        drawn = called(logits(step))
        given, clocks = logits(step), kept.make_noise(noise) if kept.random else None
        with Allocations() as made:
            token = kept.draw(given, clocks)
        assert int(token) == drawn
        assert bool(made.sizes) == (step == 0)


def test_a_seed_fixes_the_draws_and_another_changes_them() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(SamplingSettings(temperature=1.0), seed=seed)
        return [sampler(logits(step)) for step in range(20)]

    assert draws(4) == draws(4)
    assert draws(4) != draws(5)


def test_greedy_takes_the_first_of_the_likeliest_that_is_not_suppressed() -> None:
    scores = torch.zeros(1, 8)
    scores[0, [2, 5]] = 3.0
    assert Sampler(SamplingSettings(), seed=0)(scores) == 2
    assert Sampler(SamplingSettings(), seed=0, suppress=[2])(scores) == 5


def test_what_was_drawn_joins_the_history() -> None:
    sampler = Sampler(SamplingSettings(repetition_penalty=2.0), seed=0)
    scores = torch.tensor([[1.0, 1.5, 1.2]])
    assert [sampler(scores) for _ in range(3)] == [1, 2, 0]


def test_on_meta_every_draw_is_a_token() -> None:
    assert Sampler(SamplingSettings(), seed=0)(torch.empty(1, 9, device="meta")) == 0
