"""An output head in row pieces, so that it can be streamed like the layers before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowvram.models.head_rows import head_piece_rows
from lowvram.quant import PlainLinear


class HeadPiece(PlainLinear):
    """`x @ weight[start:stop].T`. `stored_rows` tells the loader which rows of which tensor (by
    its name within the part) make up `weight` [stop - start, in_features]."""

    def __init__(self, in_features: int, stored: str, start: int, stop: int) -> None:
        super().__init__(in_features, stop - start, bias=False)
        self.stored_rows = (stored, start, stop)


class PiecewiseHead(nn.Module):
    """A linear without bias, [.., in_features] -> [.., out_features], held in `pieces`.

    Args:
        in_features, out_features: as of the whole.
        itemsize: bytes of a weight, which decide how many rows a piece has.
        stored: the tensor's name within the part (`lm_head.weight`).
    """

    def __init__(self, in_features: int, out_features: int, itemsize: int, stored: str) -> None:
        super().__init__()
        rows = head_piece_rows(in_features, itemsize)
        self.in_features, self.out_features = in_features, out_features
        self.pieces = nn.ModuleList(
            HeadPiece(in_features, stored, start, min(start + rows, out_features))
            for start in range(0, out_features, rows)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([piece(x) for piece in self.pieces], dim=-1)
