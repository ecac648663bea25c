"""Rotary positions: TMRoPE of the decoders, and the axial kind of the vision tower.

Tables are made in fp32 where the positions are, on the host in practice, so that every device
gets the same ones; nothing is kept on the device between calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""cos and sin, each [..., tokens, 1, head_dim]; the first half of sin is negated, for `rotate`."""


def inverse_frequencies(width: int, theta: float) -> Tensor:
    """fp32 [width / 2] on the host: one over theta^(0/width), theta^(2/width), ..."""
    # The device is named because modules are used, and not only built, under torch.device(...).
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    return 1.0 / (theta**exponents)


def mrope(positions: Tensor, sections: Sequence[int], head_dim: int, theta: float) -> Rope:
    """fp32 tables of TMRoPE (Qwen2.5-Omni technical report, arXiv:2503.20215).

    Args:
        positions: int64 [3, B, T], the time, height and width axis of every token.
        sections: how many of the head_dim / 2 frequencies follow each axis, in order.

    Returns:
        cos and sin, each [B, T, 1, head_dim].
    """
    frequencies = inverse_frequencies(head_dim, theta).to(positions.device).split(list(sections))
    angles = [
        positions[axis % 3, ..., None].float() * part for axis, part in enumerate(frequencies)
    ]
    return _tables(torch.cat(angles, dim=-1))


def axial(rows: Tensor, columns: Tensor, head_dim: int, theta: float = 10_000.0) -> Rope:
    """fp32 tables of the vision tower: a quarter of the head turns with the row, a quarter with
    the column, twice.

    Args:
        rows, columns: int64 [N], the place of every patch in its frame.

    Returns:
        cos and sin, each [N, 1, head_dim].
    """
    frequencies = inverse_frequencies(head_dim // 2, theta).to(rows.device)
    angles = [place[:, None].float() * frequencies for place in (rows, columns)]
    return _tables(torch.cat(angles, dim=-1))


def _tables(angles: Tensor) -> Rope:
    """[..., head_dim / 2] -> cos and signed sin [..., 1, head_dim]."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn `x` [..., tokens, heads, head_dim]; worked out in the wider type of `x` and the tables,
    returned in the type of `x`."""
    cos, sin = rope
    turned = x.roll(x.shape[-1] // 2, -1)
    return (x * cos).add_(turned * sin).to(x.dtype)
