"""Attention on a CUDA device, by whichever kernel it takes, against the textbook in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvram.models.attention import attention

pytestmark = pytest.mark.gpu

ERROR = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HEADS = [(28, 4, 128), (16, 16, 80), (20, 20, 64), (4, 2, 16), (3, 1, 12)]
"""Of the 7B's layers, its vision and audio towers, the built-in model's; and a width that is no
multiple of eight."""
SIZES = [(1, 1), (1, 700), (33, 33), (64, 700), (512, 512), (300, 1200)]


def textbook(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    group = q.shape[1] // k.shape[1]
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    scores = q.double() @ keys.mT * q.shape[-1] ** -0.5
    rows, columns = scores.shape[-2:]
    if causal:
        hidden = torch.ones(rows, columns, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(hidden.triu(columns - rows + 1), float("-inf"))
    return scores.softmax(-1) @ values


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_equals_the_textbook(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Queries as a linear leaves them, keys and values as views into a longer cache."""
    own, shared, width = heads
    drawn = torch.Generator("cuda").manual_seed(own)
    for rows, keys in SIZES:
        for causal in (True, False):
            q = torch.randn(1, rows, own, width, device="cuda", generator=drawn).to(dtype)
            shape = (2, 1, shared, keys + 8, width)
            cache = torch.randn(shape, device="cuda", generator=drawn).to(dtype)
            cache[..., keys:, :] = float("nan")
            k, v = cache[..., :keys, :].unbind(0)
            found = attention(q.transpose(1, 2), k, v, causal=causal)
            wanted = textbook(q.transpose(1, 2), k, v, causal)
            assert found.dtype == dtype
            error = (found.double() - wanted).norm() / wanted.norm()
            assert error < ERROR[dtype], (rows, keys, causal)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_a_bias_hides_keys_that_are_not_written(dtype: torch.dtype) -> None:
    q = torch.randn(1, 28, 1, 128, device="cuda").to(dtype)
    k, v = torch.randn(2, 1, 4, 1024, 128, device="cuda").to(dtype).unbind(0)
    bias = torch.full((1024,), -torch.inf, device="cuda")
    bias[:777] = 0
    found = attention(q, k, v, causal=True, bias=bias)
    wanted = textbook(q, k[:, :, :777], v[:, :, :777], True)
    assert (found.double() - wanted).norm() / wanted.norm() < ERROR[dtype]
