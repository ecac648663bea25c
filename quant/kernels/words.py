"""Words of eight 4-bit integers: into the order of the outputs, and apart into floats."""

from __future__ import annotations

import torch
from torch import Tensor


def in_order(words: Tensor) -> Tensor:
    """int32 as in the file -> int32 whose nibble i, from the lowest, holds output i of eight."""
    # Even outputs lie in the low half of a word, odd ones in the high.
    even, odd = words & 0xFFFF, (words >> 16) & 0xFFFF
    return _spread(even) | _spread(odd) << 4


def _spread(nibbles: Tensor) -> Tensor:
    """Four nibbles in the low half of each int32 -> one in the low half of each byte."""
    bytes_apart = (nibbles | nibbles << 8) & 0x00FF00FF
    return (bytes_apart | bytes_apart << 4) & 0x0F0F0F0F


def into_floats(words: Tensor, values: Tensor, halves: Tensor) -> None:
    """int32 [R, N/8] as in the file -> fp32 `values` [R, N] of 0..15, in the order of the outputs;
    `halves`, fp32 of as many elements, is overwritten.

    Without a shift or any other arithmetic on integers: for CANN, whose oldest releases send
    shifts to the host, and whose later ones have let them end the process
    (github.com/triton-lang/triton-ascend/issues/472).
    """
    rows, count = words.shape
    # Bytes hold two nibbles each; two bytes hold even outputs, then two hold odd ones.
    low, high = halves.view(2, rows, count, 2, 2)
    _split(words.view(torch.uint8).view(rows, count, 2, 2), low, high)
    placed = values.view(rows, count, 2, 2, 2)
    placed[:, :, :, 0] = low.transpose(2, 3)
    placed[:, :, :, 1] = high.transpose(2, 3)


def as_stored(words: Tensor) -> Tensor:
    """int32 [R, N/8] -> fp32 [R, N] of 0..15 in the order of the file's nibbles, from the lowest;
    without shifts, like `into_floats`."""
    stored = words.view(torch.uint8)
    low, high = torch.empty((2, *stored.shape), dtype=torch.float32, device=words.device)
    _split(stored, low, high)
    return torch.stack((low, high), dim=-1).flatten(1)


def _split(stored: Tensor, low: Tensor, high: Tensor) -> None:
    """Bytes -> their low and their high four bits, as floats."""
    low.copy_(stored)
    torch.mul(low, 1 / 16, out=high).floor_()
    low.sub_(high, alpha=16)
