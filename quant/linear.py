"""A linear whose weights stay at 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .kernels import Asked, Kernel, Problem, select
from .phase import current_phase

_STORED = ("qweight", "qzeros", "scales")


class QuantLinear(nn.Module):
    """`x @ ((q - zero) * scale) + bias`, with tensors named and shaped as in an AWQ file.

    Args:
        in_features: K, a multiple of `group_size`.
        out_features: N, a multiple of 8.
        bias: whether the file holds one.
        group_size: inputs that share a scale: 32, 64 or 128.
        dtype: the type activations will have.
        scales_dtype: float16 or bfloat16, as stored; they keep it, so that nothing is rounded.
        kernel: "auto", or "reference" for the exact one.

    `after_load()` chooses the kernel and brings the stored tensors into its layout, in their
    place: there is one copy of the weights. Without it the reference kernel is used.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        group_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        scales_dtype: torch.dtype = torch.float16,
        kernel: Asked = "auto",
    ) -> None:
        super().__init__()
        if in_features % group_size or out_features % 8:
            raise ValueError(
                f"a linear of {in_features} inputs and {out_features} outputs cannot be packed; "
                f"wanted inputs in groups of {group_size} and outputs in eights"
            )
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.dtype, self.asked = group_size, dtype, kernel
        groups, words = in_features // group_size, out_features // 8
        self.register_buffer("qweight", torch.empty(in_features, words, dtype=torch.int32))
        self.register_buffer("qzeros", torch.empty(groups, words, dtype=torch.int32))
        self.register_buffer("scales", torch.empty(groups, out_features, dtype=scales_dtype))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype) if bias else None)
        self.stored_dtypes = {
            "qweight": torch.int32,
            "qzeros": torch.int32,
            "scales": scales_dtype,
        }
        self.kernel = select(Problem("meta", dtype, in_features, out_features, group_size))
        self._held: tuple[str, ...] = _STORED

    def choose(self, device: str) -> Kernel:
        """The kernel for this linear on a device of that type, and the reason for it."""
        shape = (self.in_features, self.out_features, self.group_size)
        return select(Problem(device, self.dtype, *shape), self.asked)

    def after_load(self) -> None:
        """Choose the kernel for where the tensors now are, and give it its layout."""
        qweight, qzeros, scales = (self.get_buffer(name) for name in _STORED)
        self.kernel = self.choose(qweight.device.type)
        held = self.kernel.prepare(qweight, qzeros, scales, self.group_size)
        for name in _STORED:
            del self._buffers[name]
        for name, tensor in held.items():
            self.register_buffer(name, tensor)
        self._held = tuple(held)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K], of the type given at the start -> [..., N]."""
        held = {name: self.get_buffer(name) for name in self._held}
        rows = x.reshape(-1, self.in_features)
        out = self.kernel.run(rows, held, self.bias, self.group_size, current_phase())
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, {bias=}, group={self.group_size}"
