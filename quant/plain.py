"""A linear of 16- or 32-bit weights as they are in the file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import Problem, native
from .phase import current_phase

LANES = 16
"""Numbers of which the compiled product wants a multiple."""


class PlainLinear(nn.Linear):
    """`nn.Linear`, of which a token's row is multiplied by the compiled kernels on a CPU: torch's
    product of one bfloat16 row does not keep up with memory (see `benchmarks/talker_loop.py`)."""

    _offered: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        one_row = x.numel() == self.in_features and current_phase() == "decode"
        if one_row and x.is_cpu and x.dtype == torch.bfloat16 and self.is_offered():
            return native.product_of_16_bits(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def is_offered(self) -> bool:
        """Whether the compiled kernels multiply this shape on a CPU. Asked once: it may have them
        built."""
        if self._offered is None:
            problem = Problem("cpu", torch.bfloat16, self.in_features, self.out_features, LANES)
            self._offered = native.refusal(problem) is None
        return self._offered
