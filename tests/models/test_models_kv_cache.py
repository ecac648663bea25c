"""A cache whose tokens come to a place on the device: what is hidden has no part in attention."""

from __future__ import annotations

import pytest
import torch

from lowvram.models import KVCache
from lowvram.models.attention import attention

HEADS, KV_HEADS, WIDTH, TOKENS = 6, 2, 16, 24


def filled(dtype: torch.dtype, count: int) -> tuple[KVCache, torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(1, 1, KV_HEADS, TOKENS, WIDTH, dtype, "cpu")
    cache.data.fill_(torch.nan)  # as fresh memory may be
    past = torch.randn(2, 1, KV_HEADS, count, WIDTH, generator=generator).to(dtype)
    cache.write(0, 0, past[0], past[1])
    return cache, generator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("span", [12, 24])
def test_a_hidden_rest_is_as_if_it_were_not_there(dtype: torch.dtype, span: int) -> None:
    cache, generator = filled(dtype, 7)
    plain, _ = filled(dtype, 7)
    place = torch.zeros(1, dtype=torch.int64)
    cache.follow(place, span, 7)
    for token in range(7, 12):
        q = torch.randn(1, HEADS, 1, WIDTH, generator=generator).to(dtype)
        new = torch.randn(2, 1, KV_HEADS, 1, WIDTH, generator=generator).to(dtype)
        place.fill_(token)
        assert cache.bias is not None
        cache.bias.index_fill_(0, place, 0)
        keys, values = cache.write(0, -1, new[0], new[1])
        assert keys.shape[2] == values.shape[2] == span
        found = attention(q, keys, values, causal=True, bias=cache.bias)
        wanted = attention(q, *plain.write(0, token, new[0], new[1]), causal=True)
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def test_a_longer_span_keeps_what_was_written() -> None:
    cache, _ = filled(torch.float32, 7)
    cache.follow(torch.zeros(1, dtype=torch.int64), 8, 7)
    before = cache.data[..., :7, :].clone()
    cache.follow(torch.zeros(1, dtype=torch.int64), 16, 7)
    assert torch.equal(cache.data[..., :7, :], before)
    assert not cache.data[..., 7:16, :].any()
    assert cache.bias is not None and cache.bias.isfinite().tolist() == [True] * 7 + [False] * 9


def test_a_span_longer_than_the_cache_and_a_bias_for_more_rows_are_refused() -> None:
    cache, _ = filled(torch.float32, 7)
    with pytest.raises(ValueError, match="25 tokens in a KV cache made for 24"):
        cache.follow(torch.zeros(1, dtype=torch.int64), 25, 7)
    keys, values = cache.write(0, 0, *torch.randn(2, 1, KV_HEADS, 7, WIDTH))
    with pytest.raises(ValueError, match="a bias for 2 rows"):
        attention(torch.randn(1, HEADS, 2, WIDTH), keys, values, causal=True, bias=torch.zeros(7))
