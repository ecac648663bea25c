"""The Talker against Qwen2_5OmniTalkerForConditionalGeneration."""

from __future__ import annotations

import pytest
import torch
from thinker_oracle import assert_close, loaded, oracle
from torch import Tensor

from lowvram.models import KVCache, Talker

TOKENS = 37


def talker_of(seed: int) -> Talker:
    truth = oracle(seed)
    assert truth.config.talker is not None
    config = truth.config.talker
    return loaded(lambda: Talker(config), truth.part("talker."))


def sample(width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, TOKENS, width, generator=generator)
    return x, torch.randint(-20, 60, (3, 2, TOKENS), generator=generator).cumsum(-1).abs()


def run(talker: Talker, x: Tensor, positions: Tensor, sizes: list[int]) -> Tensor:
    config = talker.model.config
    cache = KVCache(
        config.num_hidden_layers,
        len(x),
        config.num_key_value_heads,
        TOKENS,
        config.head_dim,
        x.dtype,
        "cpu",
    )
    parts, done = [], 0
    for size in sizes:
        rope = talker.rope(positions[..., done : done + size], x.dtype)
        parts.append(talker(x[:, done : done + size], rope, cache, done))
        done += size
    return torch.cat(parts, dim=1)


@pytest.mark.oracle
@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.no_grad()
def test_hidden_states_and_logits(seed: int) -> None:
    truth = oracle(seed)
    talker = talker_of(seed)
    x, positions = sample(128, seed)
    theirs = truth.find("Qwen2_5OmniTalkerForConditionalGeneration")(
        inputs_embeds=x, position_ids=positions, use_cache=False, output_hidden_states=True
    )
    hidden = run(talker, x, positions, [TOKENS])
    assert_close(hidden, theirs.hidden_states[-1])
    logits = talker.logits(hidden[:, -1])
    assert logits.dtype == torch.float32
    assert_close(logits, theirs.logits[:, -1])


@pytest.mark.oracle
@torch.no_grad()
def test_embedding() -> None:
    codes = torch.tensor([[0, 8293, 8447]])
    rows = talker_of(0).embed(codes)
    assert rows.shape == (1, 3, 128)
    theirs = oracle(0).find("Qwen2_5OmniTalkerForConditionalGeneration").get_input_embeddings()
    assert torch.equal(rows, theirs(codes))


@pytest.mark.parametrize("sizes", [[7] * 5 + [2], [16, 16, 5], [20] + [1] * 17])
@torch.no_grad()
def test_chunks_equal_the_whole(sizes: list[int]) -> None:
    talker = talker_of(3)
    x, positions = sample(128, 3)
    assert_close(run(talker, x, positions, sizes), run(talker, x, positions, [TOKENS]))


def test_sixteen_bit_logits_are_widened() -> None:
    talker = talker_of(0).bfloat16()
    assert talker.logits(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.float32
