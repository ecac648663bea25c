"""An output layer of 16 bits in the file and 8 or 4 on the device: rounded once, on load."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import Problem, cpu
from .sizes import HEAD_GROUP, HeadBits

PIECE_ROWS = 1024
"""Rows rounded at a time; a multiple of every block that weights are ordered in."""


class RoundedHead(nn.Module):
    """`x @ weight.T` for one token at a time, on the CPU in bfloat16.

    Args:
        in_features: H, a multiple of 32.
        out_features: V.
        bits: 8 (a scale for every row) or 4 (a scale and an offset for 32 inputs of a row).

    `weight` [V, H] is loaded as it is stored; `after_load()` rounds it to the nearest and lets it
    go. Where this build of torch lacks the product, the weight stays.
    """

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, bits: HeadBits) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    @property
    def rounded(self) -> bool:
        """Whether the 16-bit weights are gone."""
        return "weight" not in self._parameters

    def after_load(self) -> None:
        weight = self.weight
        shape = (self.in_features, self.out_features, HEAD_GROUP)
        if weight.device.type != "cpu" or cpu.refusal(Problem("cpu", weight.dtype, *shape)):
            return
        values = weight.data
        held = _four_bits(values) if self.bits == 4 else _eight_bits(values)
        del self._parameters["weight"]
        for name, tensor in held.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """bfloat16 [M, H] -> bfloat16 [M, V]."""
        if not self.rounded:
            return F.linear(x, self.weight)
        packed, scales = self.get_buffer("packed"), self.get_buffer("scales")
        ops, rows = torch.ops.aten, x.contiguous()
        if self.bits == 8:
            out: Tensor = ops._weight_int8pack_mm(rows, packed, scales)
        else:
            out = ops._weight_int4pack_mm_for_cpu(rows, packed, HEAD_GROUP, scales)
        return out


def _eight_bits(weight: Tensor) -> dict[str, Tensor]:
    """[V, H] -> int8 [V, H] and a bfloat16 scale for every row."""
    packed = torch.empty_like(weight, dtype=torch.int8)
    scales = weight.new_empty(len(weight), dtype=torch.bfloat16)
    for start in range(0, len(weight), PIECE_ROWS):
        rows = slice(start, start + PIECE_ROWS)
        values = weight[rows].float()
        step = (values.abs().amax(dim=1) / 127).clamp_(min=1e-12).to(torch.bfloat16)
        scales[rows] = step
        packed[rows] = values.div_(step.float().unsqueeze(1)).round_().clamp_(-127, 127)
    return {"packed": packed, "scales": scales}


def _four_bits(weight: Tensor) -> dict[str, Tensor]:
    """[V, H] -> uint8 [V, H / 2] in aten's order, bfloat16 [H / 32, V, 2] of scale and offset, for
    `(q - 8) * scale + offset`."""
    outputs, inputs = weight.shape
    packed = weight.new_empty(outputs, inputs // 2, dtype=torch.uint8)
    pairs = weight.new_empty(inputs // HEAD_GROUP, outputs, 2, dtype=torch.bfloat16)
    for start in range(0, outputs, PIECE_ROWS):
        rows = slice(start, start + PIECE_ROWS)
        grouped = weight[rows].float().unflatten(1, (-1, HEAD_GROUP))
        low, high = grouped.aminmax(dim=2)
        scale = ((high - low) / 15).clamp_(min=1e-12).to(torch.bfloat16)
        # Rounded first, so that the integers are the nearest for the offset that is kept.
        offset = (low + 8 * scale.float()).to(torch.bfloat16)
        grouped.sub_(offset.float().unsqueeze(2)).div_(scale.float().unsqueeze(2))
        q = grouped.round_().add_(8).clamp_(0, 15).flatten(1).int()
        packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        pairs[:, rows] = torch.stack((scale, offset), dim=-1).transpose(0, 1)
    return {"packed": packed, "scales": pairs}
