"""The DiT's time: an embedding, and the shifts, scales and gates a layer makes of it (adaLN).

The linears that make them are 42 % of the DiT's weights. The times of a grid are few and known
beforehand, so each linear is asked once for all of them, and its weight stays in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_FEATURES = 256
TIME_SCALE = 1000.0


class TimeEmbedding(nn.Module):
    """Sinusoidal features of a time, then a small network: [E] on the host -> [E, hidden]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(
            nn.Linear(TIME_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )

    def forward(self, times: Tensor) -> Tensor:
        half = TIME_FEATURES // 2
        frequencies = torch.exp(
            torch.arange(half, dtype=torch.float32, device="cpu") * -(math.log(10000) / (half - 1))
        )
        angles = TIME_SCALE * times[:, None] * frequencies
        features = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return self.time_mlp(features.to(next(self.time_mlp.parameters())))


class PassingLinear(nn.Module):
    """A linear whose weight [outputs, inputs] passes through the device some rows at a time.

    After `fill_from` the weight is read from where it is stored, each time it is used; a module
    that was never told where holds it like any other.
    """

    weight: Tensor

    fills = "weight"
    """The stored tensor that is read; it gets no memory."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self._stored: Callable[[int, int], Tensor] | None = None

    def fill_from(self, rows: Callable[[int, int], Tensor], device: torch.device) -> None:
        """Read from now on what `rows(start, stop)` gives, [stop - start, inputs] of the weight."""
        del self._parameters["weight"]
        self._stored = rows

    def as_built(self) -> None:
        """The weight is a parameter again."""
        self._stored = None

    def forward(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Outputs `start` to `stop` alone: [.., inputs] -> [.., stop - start]."""
        bias = self.bias[start:stop]
        stored = self.weight[start:stop] if self._stored is None else self._stored(start, stop)
        return F.linear(x, stored.to(bias), bias)


class Modulation(nn.Module):
    """Holds the linear that turns a time embedding into shifts, scales and gates (adaLN)."""

    def __init__(self, hidden: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.linear = PassingLinear(hidden, rows * hidden)

    def forward(self, time: Tensor, out: Tensor) -> None:
        """[E, hidden] -> `out` [E, rows, hidden]."""
        width = out.shape[2]
        for row in range(self.rows):
            out[:, row] = self.linear(time, row * width, (row + 1) * width)
