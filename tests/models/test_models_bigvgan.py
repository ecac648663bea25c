"""The vocoder against transformers, and how far a sample hears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_speech import tiny_token2wav, token2wav_pair
from torch import Tensor

from lowvram.config import BigVGANConfig
from lowvram.models.bigvgan import BigVGAN

Pair = tuple[Any, BigVGAN]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: Path = tmp_path_factory.mktemp("token2wav")
    theirs, ours = token2wav_pair(folder, seed=5, std=0.1)
    return theirs.code2wav_bigvgan_model, ours.code2wav_bigvgan_model


def log_mel(frames: int, seed: int = 0) -> Tensor:
    """[frames, 80] of the level of speech, natural logarithm."""
    return torch.randn(frames, 80, generator=torch.Generator().manual_seed(seed)) * 2 - 4


@pytest.mark.oracle
@pytest.mark.parametrize("frames", [1, 2, 5, 40])
def test_waveform_is_that_of_transformers(pair: Pair, frames: int) -> None:
    theirs, ours = pair
    mel = log_mel(frames, seed=frames)
    wanted = theirs(mel.T[None]).reshape(-1)
    assert wanted.shape == (240 * frames,) and wanted.std() > 1e-3
    assert torch.allclose(ours(mel), wanted, rtol=0, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("level", [-60.0, -13.3, 20.0])
def test_levels_beyond_both_ends_are_clipped_as_in_transformers(pair: Pair, level: float) -> None:
    theirs, ours = pair
    mel = torch.full((6, 80), level) + log_mel(6)
    assert torch.allclose(ours(mel), theirs(mel.T[None]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("context", "error"), [(34, 1e-7), (20, 1e-5)])
def test_context_that_a_piece_needs(context: int, error: float) -> None:
    vocoder = tiny_token2wav(seed=5, std=0.1).code2wav_bigvgan_model
    mel = log_mel(120)
    whole = vocoder(mel)[50 * 240 : 70 * 240]
    piece = vocoder(mel[50 - context : 70 + context])[context * 240 : -context * 240]
    assert whole.std() > 1e-2
    assert torch.allclose(piece, whole, rtol=0, atol=error)
    short = vocoder(mel[48:72])[2 * 240 : -2 * 240]
    assert not torch.allclose(short, whole, rtol=0, atol=10 * error)


def test_samples_stay_within_one() -> None:
    samples = tiny_token2wav(seed=5, std=0.15).code2wav_bigvgan_model(log_mel(4))
    assert samples.min() == -1 and samples.max() == 1


def test_input_stays_as_it_was() -> None:
    mel = log_mel(4)
    tiny_token2wav(seed=5).code2wav_bigvgan_model(mel)
    assert torch.equal(mel, log_mel(4))


def test_weights_are_all_there_is() -> None:
    """The loader drops modules to meta and fills parameters by name: a buffer would be lost."""
    assert list(BigVGAN(BigVGANConfig(upsample_initial_channel=64)).buffers()) == []


def test_vocoder_runs_on_meta_at_published_shapes() -> None:
    with torch.device("meta"):
        vocoder = BigVGAN(BigVGANConfig())
    assert round(sum(p.numel() for p in vocoder.parameters()) / 1e6, 1) == 115.4
    samples = vocoder(torch.zeros(136, 80, device="meta"))
    assert samples.shape == (136 * 240,) and samples.is_meta
