"""Attention against the textbook in float64, and the size of what it holds meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from allocations import Allocations
from torch import Tensor

from lowvram.models.attention import KEY_BLOCK, LONGEST_KEY_BLOCK, QUERY_BLOCK, attention, blockwise

Attention = Callable[..., Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """`attention` in other words: `blockwise` takes the scale from its caller."""
    return blockwise(q, k, v, causal=causal, scale=q.shape[-1] ** -0.5)


WAYS = pytest.mark.parametrize("way", [attention, plain], ids=["chosen", "blockwise"])


def textbook(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """All scores at once, heads repeated, in float64."""
    group = q.shape[1] // k.shape[1]
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    scores = q.double() @ keys.mT * q.shape[-1] ** -0.5
    if causal:
        rows, columns = scores.shape[-2:]
        past = columns - rows
        future = torch.arange(columns)[None] > torch.arange(rows)[:, None] + past
        scores = scores.masked_fill(future, float("-inf"))
    return scores.softmax(-1) @ values


def inputs(
    heads: int, kv_heads: int, rows: int, keys: int, *, batch: int = 2, width: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries laid out as a linear leaves them, keys and values as views into a longer cache."""
    generator = torch.Generator().manual_seed(rows * 1000 + keys)
    q = 3 * torch.randn(batch, rows, heads, width, generator=generator).transpose(1, 2)
    cache = torch.randn(2, batch, kv_heads, keys + 5, width, generator=generator)
    cache[..., keys:, :] = float("nan")
    k, v = cache[..., :keys, :].unbind(0)
    return q, k, v


SIZES = [(1, 1), (1, 37), (5, 5), (5, 33), (33, 33), (1, KEY_BLOCK + 1), (70, KEY_BLOCK + 70)]
HEADS = [(4, 4), (6, 2), (4, 1)]


@WAYS
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("sizes", "heads"), list(itertools.product(SIZES, HEADS)))
def test_equals_the_textbook(
    way: Attention, sizes: tuple[int, int], heads: tuple[int, int], causal: bool
) -> None:
    q, k, v = inputs(*heads, *sizes)
    out = way(q, k, v, causal=causal)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.double(), textbook(q, k, v, causal), rtol=0, atol=1e-5)


@WAYS
@pytest.mark.parametrize("past", [0, 1, KEY_BLOCK - 2, KEY_BLOCK - 1, KEY_BLOCK])
def test_block_edges(way: Attention, past: int) -> None:
    """Rows and keys one before, on and one after the edges of several blocks."""
    for rows in (QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 1):
        q, k, v = inputs(2, 1, rows, rows + past, batch=1, width=8)
        out = way(q, k, v, causal=True)
        torch.testing.assert_close(out.double(), textbook(q, k, v, True), rtol=0, atol=1e-5)


@WAYS
def test_one_row_over_many_keys(way: Attention) -> None:
    q, k, v = inputs(4, 2, 1, 2 * LONGEST_KEY_BLOCK + 3, batch=1, width=8)
    out = way(q, k, v, causal=True)
    torch.testing.assert_close(out.double(), textbook(q, k, v, True), rtol=0, atol=1e-5)


@WAYS
def test_large_scores_do_not_overflow(way: Attention) -> None:
    q, k, v = inputs(2, 1, 40, 40, batch=1)
    out = way(100 * q, k, v, causal=True)
    torch.testing.assert_close(out.double(), textbook(100 * q, k, v, True), rtol=0, atol=1e-4)


@WAYS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 64, 90])
def test_sixteen_bit_is_accumulated_in_fp32(way: Attention, dtype: torch.dtype, rows: int) -> None:
    """The error is that of rounding probabilities and results, not of a sum in 16 bits."""
    q, k, v = (t.to(dtype) for t in inputs(4, 2, rows, 700 + rows))
    out = way(q, k, v, causal=True)
    assert out.dtype == dtype
    error = (out.double() - textbook(q, k, v, True)).abs().max()
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("sizes", SIZES)
def test_scale(sizes: tuple[int, int]) -> None:
    q, k, v = inputs(4, 2, *sizes)
    scaled = attention(q, k, v, causal=True, scale=1.0)
    torch.testing.assert_close(scaled, attention(4 * q, k, v, causal=True), rtol=0, atol=1e-5)


@WAYS
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("heads", "rows", "keys"),
    [((2, 2), 2100, 2100), ((4, 1), 1100, 4000), ((6, 2), 1, 60_000), ((6, 2), 7, 20_000)],
)
@torch.no_grad()
def test_no_score_matrix_and_no_repeated_heads(
    way: Attention, heads: tuple[int, int], rows: int, keys: int, causal: bool
) -> None:
    """Nothing is larger than the output, one block of scores, or one block of fp32 keys."""
    query_heads, kv_heads = heads
    q, k, v = inputs(query_heads, kv_heads, rows, keys, batch=1, width=8)
    with Allocations() as made:
        way(q, k, v, causal=causal)
    scores = query_heads * QUERY_BLOCK * KEY_BLOCK
    allowed = 4 * max(query_heads * rows * 8, scores, kv_heads * LONGEST_KEY_BLOCK * 8)
    repeated = 4 * query_heads * keys * 8
    assert 0 < max(made.sizes) <= allowed < max(4 * query_heads * rows * keys, repeated)


def test_keys_of_the_future_are_not_read() -> None:
    """Whole blocks above the diagonal are skipped: what they hold cannot reach the result."""
    q, k, v = inputs(2, 1, 3 * QUERY_BLOCK, 3 * QUERY_BLOCK, batch=1, width=8)
    before = blockwise(q, k, v, causal=True, scale=0.3)[:, :, : 2 * QUERY_BLOCK]
    v[:, :, 2 * QUERY_BLOCK :] = float("nan")
    after = blockwise(q, k, v, causal=True, scale=0.3)[:, :, : 2 * QUERY_BLOCK]
    assert torch.equal(before, after)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [1, 512])
def test_meta_allocates_the_output_alone(rows: int, causal: bool) -> None:
    q = torch.empty(1, 28, rows, 128, device="meta", dtype=torch.bfloat16)
    k = torch.empty(1, 4, 46_000, 128, device="meta", dtype=torch.bfloat16)
    with Allocations("meta") as made:
        out = attention(q, k, k, causal=causal)
    assert out.device.type == "meta"
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert made.sizes == [q.nbytes]


@pytest.mark.parametrize(("heads", "rows", "keys"), [((3, 2), 4, 4), ((2, 2), 5, 4)])
def test_shapes_that_do_not_fit(heads: tuple[int, int], rows: int, keys: int) -> None:
    q, k, v = inputs(*heads, rows, keys)
    with pytest.raises(ValueError, match="wanted a multiple of heads"):
        attention(q, k, v, causal=True)
