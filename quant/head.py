"""An output layer of 16 bits in the file and 8 or 4 on the device: rounded as it is read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .kernels import Problem, cpu, native
from .phase import Phase
from .rounded import RoundedLinear
from .scratch import Scratch
from .sizes import HEAD_GROUP, HeadBits, rounding_rows


class RoundedHead(RoundedLinear):
    """A `RoundedLinear` for one token at a time, of 8 bits, or on the CPU in bfloat16 of 4.

    Args:
        in_features: H, a multiple of 32.
        out_features: V.
        bits: 8 (a scale for every row) or 4 (a scale and an offset for 32 inputs of a row).
        scratch: as of a `RoundedLinear`.

    Where a CPU build of torch lacks the product of 4 bits, it keeps the weight as it is.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: HeadBits,
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__(in_features, out_features, False, scratch)
        self.bits, self.compiled = bits, False

    def fill_from(self, rows: Callable[[int, int], Tensor], device: torch.device) -> None:
        """As `RoundedLinear.fill_from`."""
        if self.bits == 8:
            super().fill_from(rows, device)
            self.compiled = self.product == "native"
            return
        dtype = rows(0, 0).dtype
        problem = Problem("cpu", dtype, self.in_features, self.out_features, HEAD_GROUP)
        self.compiled = device.type == "cpu" and native.refusal(problem) is None
        if self.compiled or (device.type == "cpu" and cpu.refusal(problem) is None):
            del self._parameters["weight"]
            self._make_room_for_four(device)
            keep = self._keep_four_bits
        else:
            weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
            self.weight = nn.Parameter(weight, requires_grad=False)
            keep = self._keep_stored
        step = rounding_rows(self.in_features)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            keep(slice(start, stop), rows(start, stop))

    def _multiply(self, x: Tensor, phase: Phase) -> Tensor:
        # One position's logits, in whichever phase.
        if self.bits == 8:
            return super()._multiply(x, "decode")
        packed, pairs = self.get_buffer("packed"), self.get_buffer("scales")
        if self.compiled:
            return native.product(x, packed, pairs, native.OFFSETS, HEAD_GROUP, None)
        rows, product = x.contiguous(), torch.ops.aten._weight_int4pack_mm_for_cpu
        out: Tensor = product(rows, packed, HEAD_GROUP, pairs)
        return out

    def _make_room_for_four(self, device: torch.device) -> None:
        """uint8 [V, H / 2] in aten's order and bfloat16 [H / 32, V, 2] of scale and offset, for
        `(q - 8) * scale + offset`; or both as the compiled kernel has them."""
        inputs, outputs = self.in_features, self.out_features
        if self.compiled:
            packed, pairs = native.empty(inputs, outputs, HEAD_GROUP, torch.bfloat16, device)
        else:
            packed = torch.empty(outputs, inputs // 2, dtype=torch.uint8)
            pairs = torch.empty(inputs // HEAD_GROUP, outputs, 2, dtype=torch.bfloat16)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", pairs)

    def _keep_stored(self, rows: slice, weight: Tensor) -> None:
        self.weight.data[rows].copy_(weight)

    def _keep_four_bits(self, rows: slice, weight: Tensor) -> None:
        packed, pairs = self.get_buffer("packed"), self.get_buffer("scales")
        grouped = weight.float().unflatten(1, (-1, HEAD_GROUP))
        low, high = grouped.aminmax(dim=2)
        scale = ((high - low) / 15).clamp_(min=1e-12).to(torch.bfloat16)
        # Rounded first, so that the integers are the nearest for the offset that is kept.
        offset = (low + 8 * scale.float()).to(torch.bfloat16)
        grouped.sub_(offset.float().unsqueeze(2)).div_(scale.float().unsqueeze(2))
        q = grouped.round_().add_(8).clamp_(0, 15).flatten(1)
        if self.compiled:
            blocks = slice(rows.start // native.BLOCK, rows.stop // native.BLOCK)
            native.pack_rows(q.to(torch.uint8), packed[blocks])
            for place, values in enumerate((scale, offset)):
                by_block = values.unflatten(0, (-1, native.BLOCK)).transpose(1, 2)
                pairs[blocks, :, place] = by_block
            return
        q = q.int()
        packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        pairs[:, rows] = torch.stack((scale, offset), dim=-1).transpose(0, 1)
