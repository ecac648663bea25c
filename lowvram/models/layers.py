"""The two layers that the text decoders and the vision tower have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram.models.linear import LinearFactory
from lowvram.quant import apply_gated, join


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Normalised in fp32, rounded, then weighted in the input's type: the weight is kept out of
        # `rms_norm`, which would round once, after it, and drift from the published 16-bit results.
        return F.rms_norm(x, self.weight.shape, None, self.eps) * self.weight


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`; `name` is the checkpoint name of this module."""

    def __init__(
        self, width: int, hidden: int, linear: LinearFactory, name: str, *, bias: bool
    ) -> None:
        super().__init__()
        self.gate_proj = linear(f"{name}.gate_proj", width, hidden, bias)
        self.up_proj = linear(f"{name}.up_proj", width, hidden, bias)
        self.down_proj = linear(f"{name}.down_proj", hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(apply_gated(self.gate_proj, self.up_proj, x))
        return out

    def after_load(self) -> None:
        """Packed linears that read the same become one."""
        join((self.gate_proj, self.up_proj))
