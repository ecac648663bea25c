"""Triton's interpreter, on tensors of the CPU, for a process of its own: it is chosen when Triton
is imported. Importing this chooses it, and mends what it gets wrong in bfloat16."""

from __future__ import annotations

import dataclasses
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from lowvram.quant import Scratch
from lowvram.quant.kernels import reference
from lowvram.quant.kernels import triton as backend
from lowvram.quant.sizes import scratch_bytes

BOUND = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Relative error of a product whose weights are exact, or rounded to the type."""


def _mend() -> None:
    """Numbers in bfloat16 are its bits to numpy: the interpreter cuts them where a device rounds,
    and multiplies the bits."""
    builder = interpreter.InterpreterBuilder
    convert, dot = builder.cast_impl, builder.create_dot

    def rounded(self: object, source: object, target: object) -> object:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):  # type: ignore[attr-defined]
            return convert(self, source, target)
        values = torch.from_numpy(np.ascontiguousarray(source.data))  # type: ignore[attr-defined]
        bits = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, tl.bfloat16)

    def wide(self: object, left: object, right: object, *rest: object) -> object:
        pair = [
            convert(self, one, tl.float32) if one.dtype.scalar == tl.bfloat16 else one  # type: ignore[attr-defined]
            for one in (left, right)
        ]
        return dot(self, *pair, *rest)

    builder.cast_impl = builder.create_fp_trunc = builder.create_fp_to_fp = rounded
    builder.create_dot = wide
    options = interpreter.interpreter_builder.options
    # Checks of integers for overflow: twice the time, and none is near one.
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


_mend()


@dataclasses.dataclass(frozen=True)
class Linear:
    """Stored tensors, a bias, and what they stand for, in fp32."""

    held: dict[str, Tensor]
    bias: Tensor | None
    group: int

    @property
    def weights(self) -> Tensor:
        """[K, N]"""
        held = self.held
        return reference.dequantize(held["qweight"], held["qzeros"], held["scales"], self.group)

    def wanted(self, x: Tensor) -> Tensor:
        """The product in float64."""
        out = x.double() @ self.weights.double()
        return out if self.bias is None else out + self.bias.double()

    def found(self, x: Tensor, phase: str = "decode") -> Tensor:
        """The kernel's product, within the scratch that is planned."""
        scratch = Scratch()
        out = backend.run(x, self.held, self.bias, self.group, phase, scratch)  # type: ignore[arg-type]
        outputs = self.held["scales"].shape[1]
        assert out.dtype == x.dtype and out.shape == (len(x), outputs)
        assert scratch.nbytes <= scratch_bytes(x.shape[1], outputs, "triton", self.group)
        return out


def linear(
    inputs: int,
    outputs: int,
    group: int,
    *,
    scales: torch.dtype = torch.float16,
    bias: torch.dtype | None = None,
    seed: int = 0,
) -> Linear:
    """Random words, zero points and scales: every integer comes up."""
    random = torch.Generator().manual_seed(seed + inputs + outputs)

    def words(rows: int) -> Tensor:
        drawn = torch.randint(-(2**31), 2**31, (rows, outputs // 8), generator=random)
        return drawn.to(torch.int32)

    groups = inputs // group
    steps = torch.rand(groups, outputs, generator=random).mul_(0.02).to(scales)
    held = {"qweight": words(inputs), "qzeros": words(groups), "scales": steps}
    added = None if bias is None else torch.randn(outputs, generator=random).to(bias)
    return Linear(held, added, group)


def activations(rows: int, inputs: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """[rows, inputs]"""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inputs, generator=random).to(dtype)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, of the whole."""
    return float((found.double() - wanted).norm() / wanted.norm())
