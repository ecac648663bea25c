"""Shifts, scales and gates whose weights pass through the device instead of staying there."""

from __future__ import annotations

from functools import partial

import torch
from tiny_speech import tiny_codes, tiny_noise, tiny_token2wav, tiny_voice
from torch import Tensor

from lowvram.config import DiTConfig
from lowvram.models.dit import DiT
from lowvram.models.modulation import PassingLinear


def read_from(model: torch.nn.Module) -> list[tuple[int, int]]:
    """Has every passing linear of `model` read its weight; the rows asked for come back."""
    asked: list[tuple[int, int]] = []
    for module in model.modules():
        if isinstance(module, PassingLinear):
            module.fill_from(partial(_rows, module.weight.detach(), asked), torch.device("cpu"))
    return asked


def _rows(weight: Tensor, asked: list[tuple[int, int]], start: int, stop: int) -> Tensor:
    asked.append((start, stop))
    return weight[start:stop].clone()


def test_a_weight_that_passes_gives_what_one_that_stays_gives() -> None:
    stays, passes = tiny_token2wav(3), tiny_token2wav(3)
    asked = read_from(passes)
    assert asked == [] and not [n for n, _ in passes.named_parameters() if "norm.linear.w" in n]
    codes, noise, voice = tiny_codes(30), tiny_noise(30), tiny_voice()
    mel = passes.mel(passes.prepare(voice), codes, noise)
    assert torch.equal(mel, stays.mel(stays.prepare(voice), codes, noise))
    # Each once, in rows of one shift, scale or gate: 6 of each of 4 layers and 2 at the end.
    assert len(asked) == 26
    assert {stop - start for start, stop in asked} == {64}


def test_without_these_weights_the_dit_is_42_percent_smaller() -> None:
    with torch.device("meta"):
        dit = DiT(DiTConfig())
    before = sum(p.numel() for p in dit.parameters())
    for module in dit.modules():
        if isinstance(module, PassingLinear):
            module.fill_from(lambda start, stop: torch.empty(0), torch.device("meta"))
    after = sum(p.numel() for p in dit.parameters())
    assert round((before - after) / before, 2) == 0.42
    assert round((before - after) * 4 / 1e6) == 562
