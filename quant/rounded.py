"""A linear of 16 bits in the file and 8 on the device: rounded as it is read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .joined import Joinable
from .kernels import eight_bits
from .phase import Phase, current_phase
from .scratch import Scratch
from .sizes import rounding_rows

LEAST = {torch.bfloat16: 1e-12, torch.float16: 6e-8}
"""Scales are no smaller: they divide."""


class RoundedLinear(Joinable):
    """`x @ weight.T + bias`, of int8 with a scale for every output.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the file holds one; it stays as it is.
        scratch: what weights become 16- or 32-bit in where there is no product of them, shared by
            as many linears as there are; one of its own by default.

    `fill_from` reads the stored `weight` [N, K] some rows at a time and keeps them rounded to the
    nearest: what is lost is about 1 % of an output (measured: see `Report.option_errors`).
    """

    weight: Tensor
    bias: Tensor | None

    fills = "weight"
    """The stored tensor that `fill_from` reads; it gets no memory of its own before."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, scratch: Scratch | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scratch = Scratch() if scratch is None else scratch
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.as_built()

    def as_built(self) -> None:
        """Nothing is rounded, again or for the first time."""
        self.product: eight_bits.Product = "pieces"
        self.joined = ()

    @property
    def rounded(self) -> bool:
        """Whether the rounded weights are held, and not the stored ones."""
        return "weight" not in self._parameters

    def keeps_stored(self, device: str) -> bool:
        """Whether the bias stays where it was loaded on a device of that type."""
        return device not in ("cpu", "cuda")

    def fill_from(self, rows: Callable[[int, int], Tensor], device: torch.device) -> None:
        """Hold on `device` what `rows(start, stop)` gives, [stop - start, K] of the stored weight
        in the type of the activations."""
        dtype = rows(0, 0).dtype
        self.product = eight_bits.product_of(
            device.type, dtype, self.in_features, self.out_features
        )
        del self._parameters["weight"]
        # Of one type with the activations where these have 16 bits: see `eight_bits`.
        self._make_room(device, dtype if dtype == torch.float16 else torch.bfloat16)
        step = rounding_rows(self.in_features)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            self._keep(slice(start, stop), rows(start, stop).to(device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K], of the type given at the start -> [..., N]; the outputs of all that are
        joined to this one, side by side."""
        if not self.rounded:
            return F.linear(x, self.weight, self.bias)
        out = self._multiply(x.reshape(-1, self.in_features), current_phase())
        return out.view(*x.shape[:-1], out.shape[1])

    def _multiply(self, x: Tensor, phase: Phase) -> Tensor:
        packed, scales = self.get_buffer("packed"), self.get_buffer("scales")
        return eight_bits.multiply(x, packed, scales, self.bias, phase, self.scratch, self.product)

    def _make_room(self, device: torch.device, dtype: torch.dtype) -> None:
        """int8 [N, K] and a scale of `dtype` for every output."""
        inputs, outputs = self.in_features, self.out_features
        packed = torch.empty(outputs, inputs, dtype=torch.int8, device=device)
        self.register_buffer("packed", packed)
        scales = torch.empty(outputs, dtype=dtype, device=device)
        self.register_buffer("scales", scales)

    def _keep(self, rows: slice, weight: Tensor) -> None:
        values, scales = weight.float(), self.get_buffer("scales")
        step = (values.abs().amax(dim=1) / 127).clamp_(min=LEAST[scales.dtype]).to(scales.dtype)
        scales[rows] = step
        q = values.div_(step.float().unsqueeze(1)).round_().clamp_(-127, 127)
        self.get_buffer("packed")[rows] = q.to(torch.int8)

    @property
    def kind(self) -> Hashable:
        """Equal where product and bias are alike; pieces are no fewer when they are joined."""
        return None if self.product == "pieces" else (self.product, self.bias is None)

    def absorb(self, others: Sequence[RoundedLinear]) -> None:
        """As `Joinable.absorb`."""
        linears = (self, *others)
        for name in ("packed", "scales"):
            self._buffers[name] = torch.cat([linear.get_buffer(name) for linear in linears])
            for other in others:
                del other._buffers[name]
        if self.bias is not None:
            together = torch.cat([linear.get_parameter("bias") for linear in linears])
            self.bias = nn.Parameter(together, requires_grad=False)
            for other in others:
                other.bias = None
        self.joined = tuple(linear.out_features for linear in linears)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
