"""Codes to sound in one piece, against transformers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_speech import (
    drawing,
    speech_config,
    tiny_codes,
    tiny_noise,
    tiny_token2wav,
    tiny_voice,
    token2wav_pair,
)

from lowvram.config import OmniConfig
from lowvram.errors import CheckpointError
from lowvram.models.token2wav import Token2Wav
from lowvram.settings import Solver

Pair = tuple[Any, Token2Wav]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: Path = tmp_path_factory.mktemp("token2wav")
    return token2wav_pair(folder, seed=23)


@pytest.mark.oracle
@pytest.mark.parametrize("count", [1, 12, 61])
def test_whole_utterance_is_that_of_transformers(pair: Pair, count: int) -> None:
    theirs, ours = pair
    codes, noise, voice = tiny_codes(count, seed=count), tiny_noise(count), tiny_voice()
    with drawing(noise):
        wanted = theirs(torch.tensor([codes]), conditioning=voice.cond, reference_mel=voice.ref_mel)
    samples = ours(codes, voice, noise, "rk4")
    assert samples.shape == (480 * count,) and wanted.std() > 1e-2
    assert torch.allclose(samples, wanted, rtol=0, atol=3e-5)


@pytest.mark.oracle
def test_euler_is_a_numpy_integration_of_their_field(pair: Pair) -> None:
    theirs, ours = pair
    codes, noise, voice = tiny_codes(50), tiny_noise(50), tiny_voice()

    def velocity(time: float, mel: np.ndarray) -> np.ndarray:
        conditioned, plain = theirs.code2wav_dit_model(
            hidden_states=torch.from_numpy(mel.astype(np.float32))[None],
            condition_vector=voice.ref_mel,
            speaker_embedding=voice.cond[:, None].expand(-1, len(mel), -1),
            quantized_code=torch.tensor([codes]),
            time_step=torch.tensor(time, dtype=torch.float32),
        ).numpy()
        return 1.5 * conditioned - 0.5 * plain

    def euler(times: np.ndarray) -> np.ndarray:
        mel = noise.double().numpy()
        for begin, end in pairwise(times):
            mel = mel + (end - begin) * velocity(begin, mel)
        return mel

    mel = ours.mel(ours.prepare(voice, "euler"), codes, noise).numpy()
    times = 1 - np.cos(np.pi / 2 * np.arange(10) / 9)
    assert np.abs(mel - euler(times)).max() < 1e-4


def test_euler_goes_to_the_solution_of_runge_kutta_at_first_order() -> None:
    model, voice, codes, noise = tiny_token2wav(seed=3), tiny_voice(), tiny_codes(9), tiny_noise(9)
    # Trained weights are smooth in time, random ones are not: keep the slow time features only.
    fast = torch.arange(256) % 128 < 90
    weights = model.code2wav_dit_model.get_parameter("time_embed.time_mlp.0.weight")
    weights.data[:, fast] = 0

    def mel(solver: Solver, points: int) -> torch.Tensor:
        return model.mel(model.prepare(voice, solver, points), codes, noise)

    exact = mel("rk4", 10)
    assert (mel("rk4", 20) - exact).abs().max() < 1e-4
    errors = [(mel("euler", points) - exact).abs().max() for points in (10, 19, 37)]
    assert 1.7 < errors[0] / errors[1] < 2.3
    assert 1.7 < errors[1] / errors[2] < 2.3


def test_euler_is_the_default() -> None:
    model, voice, noise = tiny_token2wav(seed=3), tiny_voice(), tiny_noise(4)
    codes = tiny_codes(4)
    euler = model(codes, voice, noise, "euler")
    assert torch.equal(model(codes, voice, noise), euler)
    assert not torch.equal(model(codes, voice, noise, "rk4"), euler)


@pytest.mark.parametrize("code", [-1, 8194, 8294, 8447])
def test_a_code_outside_the_table_is_refused_on_the_host(code: int) -> None:
    """The Talker's vocabulary is larger (8448) than the table (8194 rows)."""
    with pytest.raises(CheckpointError, match=f"code {code}.*0 to 8193"):
        tiny_token2wav(seed=3)([5, code], tiny_voice(), tiny_noise(2))


def test_every_row_of_the_table_is_a_code() -> None:
    samples = tiny_token2wav(seed=3)([0, 8193], tiny_voice(), tiny_noise(2))
    assert samples.isfinite().all()


def test_weights_can_leave_and_come_back() -> None:
    model, voice, codes, noise = tiny_token2wav(seed=3), tiny_voice(), tiny_codes(7), tiny_noise(7)
    before = model(codes, voice, noise)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("meta")
    model.load_state_dict(kept, strict=True, assign=True)
    assert torch.equal(model(codes, voice, noise), before)


def test_a_checkpoint_without_speech_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no speech"):
        Token2Wav(OmniConfig())


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("bfloat16", 1e-4, 2e-2), ("float16", 1e-5, 2e-3)]
)
def test_layers_in_16_bits_are_close(dtype: str, least: float, most: float) -> None:
    """Weights and what passes between layers; the state and what is done once stay in fp32."""
    full, voice, codes, noise = tiny_token2wav(3), tiny_voice(), tiny_codes(60), tiny_noise(60)
    kind = getattr(torch, dtype)
    half = Token2Wav(OmniConfig.from_dict(speech_config()), kind)
    half.load_state_dict(full.state_dict())
    kinds = {name: p.dtype for name, p in half.named_parameters()}
    inside = {n for n, d in kinds.items() if d == kind}
    assert len(inside) == 4 * 2 * 6 and all("transformer_blocks" in name for name in inside)
    utterance = half.prepare(voice)
    assert utterance.modulation.dtype == utterance.speaker.conditioned.dtype == torch.float32
    wanted = full.mel(full.prepare(voice), codes, noise)
    mel = half.mel(utterance, codes, noise)
    assert mel.dtype == torch.float32
    assert least < (mel - wanted).square().mean().sqrt() / wanted.std() < most
    with torch.inference_mode():
        front, parts = half.wavefront(utterance), []
        for start in range(0, 24 * 8, 24):
            new = slice(start, min(start + 24, 60))
            parts.append(front.advance(codes[new], noise[2 * start : 2 * start + 48], 2).clone())
    assert (torch.cat(parts) - mel).abs().max() < 5 * most * mel.std()
