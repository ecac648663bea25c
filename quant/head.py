"""An output layer of 16 bits in the file and 8 or 4 on the device: rounded as it is read."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import Problem, cpu, eight_bits, native
from .scratch import Scratch
from .sizes import HEAD_GROUP, HEAD_PIECE_ROWS, HeadBits


class RoundedHead(nn.Module):
    """`x @ weight.T` for one token at a time: on the CPU in bfloat16, of 8 bits on CUDA too.

    Args:
        in_features: H, a multiple of 32.
        out_features: V.
        bits: 8 (a scale for every row) or 4 (a scale and an offset for 32 inputs of a row).
        scratch: what rows are made 16-bit in where CUDA has no product of them; one of its own by
            default.

    `fill_from` reads the stored `weight` [V, H] some rows at a time and keeps them rounded to the
    nearest. Where a CPU build of torch lacks the product, it keeps the weight as it is.
    """

    weight: Tensor

    fills = "weight"
    """The stored tensor that `fill_from` reads; it gets no memory of its own before."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: HeadBits,
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.scratch = Scratch() if scratch is None else scratch
        self.compiled = False
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    @property
    def rounded(self) -> bool:
        """Whether the rounded weights are held, and not the 16-bit ones."""
        return "weight" not in self._parameters

    def fill_from(self, rows: Callable[[int, int], Tensor], device: torch.device) -> None:
        """Hold on `device` what `rows(start, stop)` gives, [stop - start, H] of the stored weight
        in the type of the activations."""
        dtype = rows(0, 0).dtype
        problem = Problem("cpu", dtype, self.in_features, self.out_features, HEAD_GROUP)
        self.compiled = device.type == "cpu" and native.refusal(problem) is None
        on_cpu = device.type == "cpu" and (self.compiled or cpu.refusal(problem) is None)
        if on_cpu or (device.type == "cuda" and self.bits == 8):
            del self._parameters["weight"]
            for name, tensor in self._empty_rounded(device).items():
                self.register_buffer(name, tensor)
            keep = self._keep_four_bits if self.bits == 4 else self._keep_eight_bits
        else:
            weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
            self.weight = nn.Parameter(weight, requires_grad=False)
            keep = self._keep_stored
        for start in range(0, self.out_features, HEAD_PIECE_ROWS):
            stop = min(start + HEAD_PIECE_ROWS, self.out_features)
            keep(slice(start, stop), rows(start, stop))

    def forward(self, x: Tensor) -> Tensor:
        """[M, H] of the type of the activations -> [M, V]."""
        if not self.rounded:
            return F.linear(x, self.weight)
        packed, scales = self.get_buffer("packed"), self.get_buffer("scales")
        if self.compiled:
            if self.bits == 8:
                return native.product_of_bytes(x, packed, scales)
            return native.product(x, packed, scales, native.OFFSETS, HEAD_GROUP, None)
        if packed.device.type != "cpu":
            return eight_bits.multiply(x, packed, scales, None, "decode", self.scratch)
        ops, rows = torch.ops.aten, x.contiguous()
        if self.bits == 8:
            out: Tensor = ops._weight_int8pack_mm(rows, packed, scales)
        else:
            out = ops._weight_int4pack_mm_for_cpu(rows, packed, HEAD_GROUP, scales)
        return out

    def _empty_rounded(self, device: torch.device) -> dict[str, Tensor]:
        """Of 8 bits int8 [V, H] and a bfloat16 scale for every row; of 4 uint8 [V, H / 2] in
        aten's order and bfloat16 [H / 32, V, 2] of scale and offset, for `(q - 8) * scale +
        offset`; or both as the compiled kernel has them."""
        inputs, outputs = self.in_features, self.out_features
        if self.bits == 8:
            return {
                "packed": torch.empty(outputs, inputs, dtype=torch.int8, device=device),
                "scales": torch.empty(outputs, dtype=torch.bfloat16, device=device),
            }
        if self.compiled:
            held = native.empty(inputs, outputs, HEAD_GROUP, torch.bfloat16, device)
            return dict(zip(("packed", "scales"), held, strict=True))
        pairs = torch.empty(inputs // HEAD_GROUP, outputs, 2, dtype=torch.bfloat16)
        return {
            "packed": torch.empty(outputs, inputs // 2, dtype=torch.uint8),
            "scales": pairs,
        }

    def _keep_stored(self, rows: slice, weight: Tensor) -> None:
        self.weight.data[rows].copy_(weight)

    def _keep_eight_bits(self, rows: slice, weight: Tensor) -> None:
        packed, scales = self.get_buffer("packed"), self.get_buffer("scales")
        values = weight.float()
        step = (values.abs().amax(dim=1) / 127).clamp_(min=1e-12).to(torch.bfloat16)
        scales[rows] = step
        q = values.div_(step.float().unsqueeze(1)).round_().clamp_(-127, 127)
        packed[rows] = q.to(torch.int8)

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
