"""Log-mel features: against transformers' extractor, and beyond the 300 s where it stops."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from conversation_files import tone
from conversation_oracle import feature_extractor

from lowvram.conversation.mel import _filters, log_mel
from lowvram.conversation.tokens import mel_frames

BINS = 128


def speechlike(seconds: float, seed: int = 0) -> np.ndarray:
    t = np.arange(round(seconds * 16_000)) / 16_000
    rng = np.random.default_rng(seed)
    voiced = sum(np.sin(2 * np.pi * 120 * k * t * (1 + 0.02 * t)) / k for k in range(1, 30))
    loud = 0.5 + 0.5 * np.sin(2 * np.pi * 2 * t)
    return (0.1 * voiced * loud + 0.003 * rng.standard_normal(len(t))).astype(np.float32)


def noise(seconds: float) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)


WAVES = {
    "speech-like": speechlike(3.21),
    "noise": noise(2.5),
    "one window": speechlike(0.03),
    "shorter than the mirror": speechlike(0.0125),
    "silence": np.zeros(8000, np.float32),
    "quiet": 1e-4 * speechlike(1.0),
    "whole frames": speechlike(1.0)[:15_840],
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", WAVES)
def test_features_are_those_of_transformers_on_audio_padded_to_300_s(name: str) -> None:
    wave = WAVES[name]
    theirs = feature_extractor()(wave, sampling_rate=16_000, return_attention_mask=True)
    frames = int(theirs["attention_mask"].sum())
    ours = log_mel(wave, BINS)
    assert ours.shape == (BINS, frames) == (BINS, mel_frames(len(wave)))
    np.testing.assert_allclose(ours, theirs["input_features"][0][:, :frames], rtol=0, atol=2e-5)


@pytest.mark.oracle
def test_a_pure_tone_differs_by_less_than_their_two_implementations_do() -> None:
    """Bins eight powers of ten below the tone are rounding noise of the float32 transform."""
    wave = tone(3.0)
    extractor = feature_extractor()
    torch_way = extractor._torch_extract_fbank_features(np.pad(wave, (0, 16_000))[None])[0]
    numpy_way = extractor._np_extract_fbank_features(np.pad(wave, (0, 16_000))[None], "cpu")[0]
    ours = log_mel(wave, BINS)
    frames = ours.shape[1]
    np.testing.assert_allclose(ours, numpy_way[:, :frames], rtol=0, atol=1e-6)
    apart = np.abs(torch_way - numpy_way)[:, :frames].max()
    assert np.abs(ours - torch_way[:, :frames]).max() <= apart + 1e-6


@pytest.mark.oracle
def test_the_filters_are_those_of_transformers() -> None:
    np.testing.assert_allclose(_filters(BINS), feature_extractor().mel_filters.T, atol=1e-12)


@pytest.mark.oracle
def test_audio_beyond_300_s_keeps_every_frame() -> None:
    """Their extractor, told not to cut, agrees everywhere but in the mirror at its end."""
    wave = noise(310.0)
    theirs = feature_extractor()(wave, sampling_rate=16_000, truncation=False)
    ours = log_mel(wave, BINS)
    assert ours.shape == (BINS, 31_000)
    wanted = theirs["input_features"][0]
    np.testing.assert_allclose(ours[:, :-2], wanted[:, : 31_000 - 2], rtol=0, atol=2e-4)
    assert np.abs(ours[:, :-2] - wanted[:, : 31_000 - 2]).mean() < 1e-6


def test_memory_stays_near_the_result() -> None:
    wave = noise(300.0)
    tracemalloc.start()
    features = log_mel(wave, BINS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole_spectrum = 30_000 * 201 * 16
    assert peak < features.nbytes + 0.75 * whole_spectrum


def test_loudness_is_judged_over_the_whole_recording() -> None:
    """The floor is eight powers of ten below the loudest frame, wherever it is."""
    quiet = 1e-4 * noise(1.0)
    alone = log_mel(quiet, BINS)
    beside = log_mel(np.concatenate([quiet, 100 * noise(1.0)]), BINS)
    assert alone[:, :50].max() > alone.min() + 0.1
    assert (beside[:, :50] == beside.min()).all()
