"""The audio tower, a window at a time, against Qwen2_5OmniAudioEncoder on whole recordings."""

from __future__ import annotations

import copy

import pytest
import torch
from thinker_oracle import Oracle, assert_close, loaded, oracle

from lowvram.models import AudioTower
from lowvram.models.audio import sinusoids

WINDOW = 200
TAILS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 50, 51, 99, 100, 101, 102, 103, 150, 177, 197, 198, 199]


def tower_of(truth: Oracle) -> AudioTower:
    config = truth.config.thinker.audio
    return loaded(lambda: AudioTower(config), truth.part("thinker.audio_tower."))


def mel_of(frames: int, seed: int) -> torch.Tensor:
    return torch.randn(128, frames, generator=torch.Generator().manual_seed(seed))


@pytest.mark.oracle
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_window_by_window_equals_the_recording(seed: int) -> None:
    truth = oracle(seed)
    theirs, tower = truth.find("Qwen2_5OmniAudioEncoder"), tower_of(truth)
    for frames in [WINDOW, 3 * WINDOW, *TAILS[2:], *(2 * WINDOW + tail for tail in TAILS)]:
        mel = mel_of(frames, seed)
        expected = theirs(mel, feature_lens=torch.tensor([frames])).last_hidden_state
        ours = torch.cat([tower(window) for window in mel.split(WINDOW, dim=1)])
        assert_close(ours, expected)


@torch.no_grad()
def test_a_tail_too_short_for_a_token_gives_none() -> None:
    tower = tower_of(oracle(0))
    assert [tower(mel_of(frames, 0)).shape[0] for frames in (1, 2, 3, 200)] == [0, 0, 1, 50]


@pytest.mark.oracle
@torch.no_grad()
def test_sixteen_bit() -> None:
    truth = oracle(2)
    exact = truth.find("Qwen2_5OmniAudioEncoder")
    rounded = copy.deepcopy(exact)
    for weight in rounded.parameters():
        weight.data = weight.data.bfloat16()
    mel = mel_of(WINDOW, 2).bfloat16()
    expected, theirs = (
        model(values, feature_lens=torch.tensor([WINDOW])).last_hidden_state
        for model, values in ((exact, mel.float()), (rounded, mel))
    )
    ours = tower_of(truth).bfloat16()(mel)
    assert ours.dtype == torch.bfloat16
    rounding = (theirs.float() - expected).square().mean().sqrt()
    assert (ours.float() - theirs.float()).square().mean().sqrt() < 0.3 * rounding


@pytest.mark.oracle
@torch.no_grad()
def test_half_precision_stays_finite() -> None:
    """A layer's sum past the fp16 maximum is kept below it, as transformers does."""
    truth = oracle(2)
    theirs = copy.deepcopy(truth.find("Qwen2_5OmniAudioEncoderLayer")).half()
    theirs.fc2.bias[:8], theirs.fc2.bias[8:16] = 65000.0, -65000.0
    ours = tower_of(truth).half().layers[0]
    ours.load_state_dict({"fc2.bias": theirs.fc2.bias}, strict=False)
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(4)).half()
    x[:, :16] *= 1000
    expected = theirs(x, cu_seqlens=torch.tensor([0, 100]))[0]
    assert expected.abs().max() > 64000
    assert_close(ours(x).float(), expected.float(), 1e-3)


def test_a_window_too_long_says_so() -> None:
    with pytest.raises(ValueError, match="201 mel frames; a window has at most 200"):
        tower_of(oracle(0))(mel_of(201, 0))


@pytest.mark.oracle
def test_positions() -> None:
    theirs = oracle(0).find("SinusoidsPositionEmbedding").positional_embedding
    assert torch.equal(sinusoids(100, theirs.shape[1]), theirs[:100])
