"""How the linears of a decoder are made: dense here, 4-bit where the checkpoint is packed."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lowvram.quant import PlainLinear

LinearFactory = Callable[[str, int, int, bool], nn.Module]
"""(checkpoint name of the linear, in_features, out_features, bias) -> the module."""


def dense(name: str, in_features: int, out_features: int, bias: bool) -> nn.Module:
    """The factory for 16- and 32-bit weights, whatever the name."""
    return PlainLinear(in_features, out_features, bias=bias)
