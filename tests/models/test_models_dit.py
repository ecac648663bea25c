"""The DiT against transformers: one evaluation of the velocity field, and what it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_speech import tiny_codes, tiny_noise, tiny_token2wav, tiny_voice, token2wav_pair
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.config import DiTConfig
from lowvram.models.dit import GUIDANCE, DiT, block_attention

Pair = tuple[Any, DiT]

SHAPES: dict[str, dict[str, Any]] = {
    "as published": {},
    "both ways at once": {
        "block_size": 8,
        "look_ahead_layers": [1, 2],
        "enc_res2net_scale": 4,
    },
    "three frames a code": {"repeats": 3, "block_size": 6, "head_dim": 8, "rope_theta": 500.0},
}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: Path = tmp_path_factory.mktemp("token2wav")
    theirs, ours = token2wav_pair(folder, seed=11, **SHAPES[request.param])
    return theirs.code2wav_dit_model, ours.code2wav_dit_model


def their_velocity(dit: Any, mel: Tensor, codes: list[int], time: Tensor) -> Tensor:
    voice = tiny_voice()
    output = dit(
        hidden_states=mel[None],
        condition_vector=voice.ref_mel,
        speaker_embedding=voice.cond[:, None].expand(-1, len(mel), -1),
        quantized_code=torch.tensor([codes]),
        time_step=time,
    )
    return output[0] + (output[0] - output[1]) * GUIDANCE


@pytest.mark.oracle
@pytest.mark.parametrize("count", [1, 5, 12, 13, 24, 29, 36])
def test_velocity_is_that_of_transformers(pair: Pair, count: int) -> None:
    theirs, ours = pair
    codes, voice = tiny_codes(count, seed=count), tiny_voice()
    mel = torch.randn(count * ours.config.repeats, 80, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([0.0, 0.357, 1.0])
    condition = ours.condition(torch.tensor(codes), ours.speaker(voice.cond, voice.ref_mel))
    for time, row in zip(times, ours.modulate(times), strict=True):
        wanted = their_velocity(theirs, mel, codes, time)
        assert wanted.std() > 0.05
        assert torch.allclose(ours(mel, row, condition), wanted, rtol=0, atol=1e-5)


@pytest.mark.oracle
def test_speaker_vector_is_that_of_transformers(pair: Pair) -> None:
    theirs, ours = pair
    mel = torch.cat([tiny_voice().ref_mel, torch.zeros(1, 31, 80)])
    wanted = theirs.input_embed.spk_encoder(mel)
    assert torch.allclose(ours.input_embed.spk_encoder(mel), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 7, 8, 9, 16, 20, 24, 31])
@pytest.mark.parametrize(("look_back", "look_ahead"), [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)])
def test_blocks_without_a_mask_are_dense_attention_with_one(
    frames: int, look_back: int, look_ahead: int
) -> None:
    generator = torch.Generator().manual_seed(frames)
    q, k, v = (torch.randn(2, frames, 3, 4, generator=generator) for _ in range(3))
    block = torch.arange(frames) // 8
    ahead = block[None, :] - block[:, None]
    seen = (ahead >= -look_back) & (ahead <= look_ahead)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    dense = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    banded = block_attention(q, k, v, block=8, look_back=look_back, look_ahead=look_ahead)
    assert torch.allclose(banded, dense, rtol=0, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of values in the largest tensor an operation returned."""

    values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, tuple | list) else [result]:
            if isinstance(out, Tensor):
                self.values = max(self.values, out.numel())
        return result


def test_nothing_grows_with_the_square_of_the_length() -> None:
    dit, voice = tiny_token2wav(seed=1).code2wav_dit_model, tiny_voice()
    speaker, row = dit.speaker(voice.cond, voice.ref_mel), dit.modulate(torch.zeros(1))[0]
    largest = []
    for count in (120, 480):
        condition = dit.condition(torch.zeros(count, dtype=torch.int64), speaker)
        with LargestTensor() as seen:
            dit(tiny_noise(count), row, condition)
        largest.append(seen.values)
    assert largest[1] <= 4.1 * largest[0]


def test_a_piece_hears_two_blocks_back_and_one_ahead() -> None:
    """The reach of one evaluation, on which the official contexts of 24 and 12 codes rest."""
    dit, voice = tiny_token2wav(seed=2).code2wav_dit_model, tiny_voice()
    speaker, row = dit.speaker(voice.cond, voice.ref_mel), dit.modulate(torch.full((1,), 0.5))[0]
    codes = tiny_codes(96)

    def block_five(changed: int) -> Tensor:
        altered = list(codes)
        altered[12 * changed] = (altered[12 * changed] + 1) % 8193
        out = dit(tiny_noise(96), row, dit.condition(torch.tensor(altered), speaker))
        return out[5 * 24 : 6 * 24]

    reach = [b for b in range(8) if not torch.equal(block_five(b), block_five(7))]
    assert reach == [3, 4, 5, 6]


def test_weights_are_all_there_is() -> None:
    """The loader drops modules to meta and fills parameters by name: a buffer would be lost."""
    assert list(tiny_token2wav(seed=1).buffers()) == []


def test_dit_runs_on_meta_at_published_shapes() -> None:
    with torch.device("meta"):
        dit = DiT(DiTConfig())
    assert round(sum(p.numel() for p in dit.parameters()) / 1e6, 1) == 333.6
    speaker = dit.speaker(torch.zeros(1, 192), torch.zeros(1, 400, 80))
    modulation = dit.modulate(torch.zeros(9))
    assert modulation.shape == (9, 6 * 22 + 2, 1024)
    condition = dit.condition(torch.zeros(83, dtype=torch.int64, device="meta"), speaker)
    out = dit(torch.zeros(166, 80, device="meta"), modulation[0], condition)
    assert out.shape == (166, 80) and out.is_meta
