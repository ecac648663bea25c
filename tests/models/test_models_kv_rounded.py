"""Keys and values in 8 bits: how far off, whatever the outliers, and the same however they come."""

from __future__ import annotations

import pytest
import torch

from lowvram.config import DecoderConfig
from lowvram.models.kv_rounded import RoundedKVCache
from lowvram.planner.laws import kv_layer_bytes, rounded_kv_layer_bytes
from lowvram.specs import SPECS

LAYERS, HEADS, TOKENS, WIDTH = 2, 2, 24, 64
TYPES = [torch.float16, torch.bfloat16, torch.float32]


def cache(dtype: torch.dtype, tokens: int = TOKENS) -> RoundedKVCache:
    made = RoundedKVCache(LAYERS, 1, HEADS, tokens, WIDTH, dtype, "cpu")
    made.data.fill_(77)
    for tensor in made.tensors[1:]:
        tensor.fill_(torch.nan)  # as fresh memory may be
    return made


def given(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """With channels a hundred times as large as the others, as keys have them."""
    generator = torch.Generator().manual_seed(tokens)
    keys, values = torch.randn(2, 1, HEADS, tokens, WIDTH, generator=generator)
    keys[..., 3] += 100
    return keys.to(dtype), values.to(dtype)


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


@pytest.mark.parametrize("dtype", TYPES)
def test_it_gives_back_what_was_written(dtype: torch.dtype) -> None:
    kept = cache(dtype)
    keys, values = given(20, dtype)
    found = kept.write(1, 0, keys, values)
    assert [one.dtype for one in found] == [dtype] * 2 and kept.error is not None
    assert 0 < off(found[1], values) < 0.01 and 0 < off(found[0], keys) < 0.015
    # Those that share no scale with the large one.
    assert off(found[0][..., 32:], keys[..., 32:]) < 0.01
    assert 0 < kept.error < 0.015
    zeros = torch.zeros(1, HEADS, 1, WIDTH, dtype=dtype)
    found = kept.write(1, 20, zeros, zeros)
    assert not found[0][:, :, 20].any() and found[0].shape[2] == 21


@pytest.mark.parametrize("dtype", TYPES)
def test_in_pieces_one_by_one_and_in_place_it_is_the_same(dtype: torch.dtype) -> None:
    keys, values = given(TOKENS, dtype)
    whole, pieces, placed = cache(dtype), cache(dtype), cache(dtype)
    wanted = [one.clone() for one in whole.write(0, 0, keys, values)]
    for start, stop in ((0, 7), (7, 8), (8, TOKENS)):
        span = slice(start, stop)
        found = pieces.write(0, start, keys[:, :, span], values[:, :, span])
    assert all(torch.equal(*both) for both in zip(found, wanted, strict=True))
    placed.write(0, 0, keys[:, :, :20], values[:, :, :20])
    place = torch.zeros(1, dtype=torch.int64)
    placed.follow(place, TOKENS, 20)
    for token in range(20, TOKENS):
        place.fill_(token)
        span = slice(token, token + 1)
        found = placed.write(0, -1, keys[:, :, span], values[:, :, span])
        assert not any(one.isnan().any() for one in found)
        assert not found[0][:, :, token + 1 :].any()
    assert all(torch.equal(*both) for both in zip(found, wanted, strict=True))


def test_it_is_as_long_as_it_was_made() -> None:
    kept = cache(torch.float32, 8)
    with pytest.raises(ValueError, match="9 tokens in a KV cache made for 8"):
        kept.write(0, 0, *given(9, torch.float32))
    kept.free()
    assert kept.nbytes == 0


def test_it_takes_what_is_planned() -> None:
    text: DecoderConfig = SPECS["Qwen2.5-Omni-7B"].config.thinker.text
    for dtype in TYPES:
        shape = (text.num_hidden_layers, 1, text.num_key_value_heads, 50, text.head_dim)
        kept = RoundedKVCache(*shape, dtype, "meta")
        rounded = rounded_kv_layer_bytes(text, 50, dtype.itemsize)
        wide = kv_layer_bytes(text, 50, dtype.itemsize)
        assert kept.nbytes == text.num_hidden_layers * rounded + wide
        new = torch.empty(1, text.num_key_value_heads, 3, text.head_dim, device="meta")
        assert kept.write(0, 0, new.to(dtype), new.to(dtype))[0].shape[2] == 3
        assert kept.error is None
