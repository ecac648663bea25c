"""A linear whose weights stay at 4 bits."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .joined import Joinable
from .kernels import Beside, Kernel, Problem, Stored, select, select_stored
from .phase import current_phase
from .scratch import Scratch
from .side_by_side import side_by_side
from .sizes import AS_STORED, Asked

_STORED = ("qweight", "qzeros", "scales")


class QuantLinear(Joinable):
    """`x @ ((q - zero) * scale) + bias`, with tensors named and shaped as in an AWQ file.

    Args:
        in_features: K, a multiple of `group_size`.
        out_features: N, a multiple of 8.
        bias: whether the file holds one.
        group_size: inputs that share a scale: 32, 64 or 128.
        dtype: the type activations will have.
        scales_dtype: float16 or bfloat16, as stored; they keep it, so that nothing is rounded.
        kernel: "auto", or "reference" for the exact one.
        scratch: what weights are de-quantized into, shared by as many linears as there are; one of
            its own by default.

    `after_load()` chooses the kernel and brings the stored tensors into its layout, in their
    place: there is one copy of the weights. Without it a kernel is used that computes from the
    stored tensors on the device they come to. Where nothing is left to do it does nothing.
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
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__()
        if in_features % group_size or out_features % 8:
            raise ValueError(
                f"a linear of {in_features} inputs and {out_features} outputs cannot be packed; "
                f"wanted inputs in groups of {group_size} and outputs in eights"
            )
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.dtype, self.asked = group_size, dtype, kernel
        self.scratch = Scratch() if scratch is None else scratch
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
        self.as_built()

    def as_built(self) -> None:
        """The tensors are again, or for the first time, the stored ones: compute from those."""
        self._stored_on, self.kernel = "meta", self.choose("meta")
        self._held: tuple[str, ...] = _STORED
        self.joined = ()

    def keeps_stored(self, device: str) -> bool:
        """Whether `after_load` on a device of that type leaves the stored tensors in place, also
        where they may be joined."""
        return self.choose(device).name in AS_STORED

    def choose(self, device: str) -> Kernel:
        """The kernel for this linear on a device of that type, and the reason for it."""
        return select(self._problem(device), self.asked)

    def _as_stored(self, device: str) -> Kernel:
        """The kernel for stored tensors on a device of that type."""
        return select_stored(self._problem(device), self.asked)

    @property
    def stored(self) -> bool:
        """Whether it holds what the file has, and not what was made of that."""
        return self._held is _STORED

    def choose_stored(self, device: str) -> Kernel:
        """The kernel for stored tensors on a device of that type, as the linear's own from now
        on."""
        if self._stored_on != device:
            self._stored_on, self.kernel = device, self._as_stored(device)
        return self.kernel

    def _problem(self, device: str) -> Problem:
        return Problem(device, self.dtype, self.in_features, self.out_features, self.group_size)

    def after_load(self) -> None:
        """Choose the kernel for where the tensors now are, and give it its layout."""
        if self.joined or "qweight" not in self._buffers:
            return
        qweight, qzeros, scales = (self.get_buffer(name) for name in _STORED)
        self.kernel = self.choose(qweight.device.type)
        held = self.kernel.prepare(qweight, qzeros, scales, self.group_size)
        for name in _STORED:
            del self._buffers[name]
        for name, tensor in held.items():
            self.register_buffer(name, tensor)
        self._held = tuple(held)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K], of the type given at the start -> [..., N]; the outputs of all that are
        joined to this one, side by side."""
        rows, held = x.reshape(-1, self.in_features), self._prepared()
        if self.stored:
            self.choose_stored(rows.device.type)
        out = self.kernel.run(rows, held, self.bias, self.group_size, current_phase(), self.scratch)
        return out.view(*x.shape[:-1], out.shape[1])

    def gated(self, x: Tensor) -> Tensor | None:
        """x [..., K] -> silu of the one half of all outputs times the other, [..., N / 2]; None
        where the kernel does not do that in one go, or not in this phase."""
        if self.kernel.gated is None or current_phase() != "decode":
            return None
        rows, held = x.reshape(-1, self.in_features), self._prepared()
        out = self.kernel.gated(rows, held, self.bias, self.group_size, self.scratch)
        return out.view(*x.shape[:-1], out.shape[1])

    def beside(self, others: Sequence[nn.Module], x: Tensor) -> Tensor | None:
        """As `Joinable.beside`, of linears that all have their stored tensors."""
        together = self._beside(others, x.device.type)
        if together is None:
            return None
        kernel, linears = together
        rows = x.reshape(-1, self.in_features)
        out = kernel.outputs(rows, linears, self.group_size, current_phase())
        return out.view(*x.shape[:-1], out.shape[1])

    def gated_with(self, up: nn.Module, x: Tensor) -> Tensor | None:
        """As `Joinable.gated_with`, of linears that both have their stored tensors."""
        together = self._beside((up,), x.device.type) if current_phase() == "decode" else None
        if together is None:
            return None
        kernel, (gate, passed) = together
        out = kernel.gated(x.reshape(-1, self.in_features), gate, passed, self.group_size)
        return out.view(*x.shape[:-1], out.shape[1])

    def _beside(
        self, others: Sequence[nn.Module], device: str
    ) -> tuple[Beside, list[Stored]] | None:
        """The kernel that computes this linear and others from their stored tensors in one go, and
        those tensors; None where there is none."""
        linears = [self, *(other for other in others if isinstance(other, QuantLinear))]
        if len(linears) <= len(others) or not all(one.stored for one in linears):
            return None
        kernel = self.choose_stored(device)
        if kernel.beside is None or len({one._stored_kind(device) for one in linears}) > 1:
            return None
        return kernel.beside, [(one._prepared(), one.bias) for one in linears]

    def _stored_kind(self, device: str) -> Hashable:
        kernel = self.choose_stored(device).name
        return kernel, self.group_size, self.in_features, self.scales.dtype

    def _prepared(self) -> dict[str, Tensor]:
        # `get_buffer` takes longer than a small product's launch.
        return {name: cast(Tensor, self._buffers[name]) for name in self._held}

    @property
    def kind(self) -> Hashable:
        """Equal where kernel, groups and bias are alike, and the kernel gains from joining."""
        if not self.kernel.joins:
            return None
        return self.kernel.name, self.group_size, self.bias is None

    def absorb(self, others: Sequence[QuantLinear]) -> None:
        """As `Joinable.absorb`, of prepared weights."""
        linears = (self, *others)
        axes = self.kernel.joins | ({} if self.bias is None else {"bias": 0})
        parts = [[linear.get_buffer(name) for linear in linears] for name in axes]
        for name, whole in zip(axes, side_by_side(parts, axes.values()), strict=True):
            self._buffers[name] = whole
            for other in others:
                del other._buffers[name]
        for other in others:
            other.register_buffer("bias", None)
        self.joined = tuple(linear.out_features for linear in linears)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, {bias=}, group={self.group_size}"
