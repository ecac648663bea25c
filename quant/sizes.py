"""Bytes that 4-bit linears take, and the kernel they get: arithmetic, to plan without torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

from . import chips
from .native import not_offered
from .triton import not_offered as triton_not_offered
from .triton import too_old

KernelName = Literal["reference", "cpu", "native", "tinygemm", "ascend", "triton"]
Asked = Literal["auto", "reference"]

PIECE_WEIGHTS: dict[KernelName, int] = {
    "reference": 1 << 22,
    "cpu": 1 << 21,
    "native": 1 << 21,
    "tinygemm": 1 << 22,
    "ascend": 1 << 22,
    "triton": 1 << 22,
}
"""Weights de-quantized at a time. On the CPU a piece stays in the cache until it is multiplied. Of
`ascend`: weights turned on the host at a time, and results of one of several products."""

TAKEN_PER_WEIGHT: dict[KernelName, int] = {"cpu": 3, "native": 3, "tinygemm": 7}
"""Bytes of scratch per weight of a piece, rounded up to hold its group's scale and zero too.

`native` needs none, and is planned like `cpu`, which takes its place where it cannot be built; for
what streams the reference does, in pieces that fit (`columns_within`).
"""


AS_STORED: frozenset[KernelName] = frozenset({"reference", "triton"})
"""Kernels that compute from the tensors as they are in the file."""

STREAMING: frozenset[KernelName] = frozenset({"triton", "ascend", "native"})
"""Kernels that have a product for layers that stream; others leave those to `reference`."""


EIGHT_BIT_PIECE = 1 << 22
"""8-bit weights that become 16-bit at a time."""


class KernelChoice(NamedTuple):
    """The kernel for packed linears by name, and why, in words for the plan."""

    name: KernelName
    reason: str


def preferred_kernel(
    device: str, dtype: str, asked: Asked = "auto", weights: int = 0
) -> KernelChoice:
    """The kernel for a type of device and of activations (`cuda`, `bfloat16`), and linears of at
    least so many `weights`.

    A machine on which it turns out to be missing falls back to another that takes no more memory,
    or to the reference. Nothing is built to find out.
    """
    if asked == "reference":
        return KernelChoice("reference", "asked for")
    if device == "npu":
        return _on_npu(dtype)
    if device == "cuda" and dtype in ("bfloat16", "float16"):
        return _on_cuda(dtype)
    if dtype != "bfloat16":
        return KernelChoice("reference", f"the 4-bit products are in bfloat16, not in {dtype}")
    if device == "cpu":
        choice = "bfloat16 on the CPU: 4-bit product"
        refused = not_offered(weights)
        if refused is None:
            reason = f"{choice}s compiled for this processor, of layers that stream too"
            return KernelChoice("native", reason)
        reason = f"{choice} to decode, 16-bit to prefill; compiled kernels are not used: {refused}"
        return KernelChoice("cpu", reason)
    return KernelChoice("reference", f"there is no 4-bit product on {device}")


def native_layers(device: str, dtype: str, width: int, inner: int) -> KernelChoice | None:
    """What computes a decoder layer of one token, `width` wide and its MLP `inner`, on a type of
    device: all at once, or why it goes operation by operation; None where that is no question.
    Nothing is built to find out."""
    if device != "cpu" or dtype != "bfloat16":
        return None
    refused = not_offered(width * inner)
    if refused is None:
        return KernelChoice("native", "a token goes through a layer in one compiled call")
    reason = f"a token goes through a layer operation by operation: {refused}"
    return KernelChoice("cpu", reason)


def _on_npu(dtype: str) -> KernelChoice:
    if dtype not in ("bfloat16", "float16"):
        return KernelChoice("reference", f"Ascend's 4-bit product is in 16 bits, not in {dtype}")
    refused = chips.refusal()
    if refused is not None:
        return KernelChoice("reference", f"{refused}; weights are de-quantized for every product")
    reason = f"{dtype} on Ascend: {chips.OPERATOR} in both phases, of layers that stream too"
    for shape, why in chips.refused_shapes.items():
        reason += f"; linears of {shape} are de-quantized: {why}"
    return KernelChoice("ascend", reason)


def _on_cuda(dtype: str) -> KernelChoice:
    refused = triton_not_offered(dtype)
    if refused is None:
        reason = "own kernels to decode, cuBLAS to prefill, layers that stream too"
        return KernelChoice("triton", f"{dtype} on CUDA: {reason}")
    reason = f"own kernels are not used: {refused}"
    if dtype == "bfloat16" and too_old() is None:
        return KernelChoice("tinygemm", f"{reason}; tinygemm to decode, cuBLAS to prefill")
    return KernelChoice("reference", f"{reason}; nor has torch a product in {dtype}")


def linear_bytes(inputs: int, outputs: int, group: int, kernel: KernelName = "reference") -> int:
    """Bytes held by the weights of a linear (its bias aside) once it is ready for `kernel`.

    `reference` and `triton` keep what the file holds: 4-bit weights and zero points, 16-bit scales.
    The others keep the weights in their own order and, for every group, two numbers of 16 bits: a
    scale, and an offset or a zero point.
    """
    groups = inputs // group
    weights = inputs * outputs // 2
    if kernel in AS_STORED:
        return weights + groups * outputs // 2 + groups * outputs * 2
    return weights + groups * outputs * 4


def scratch_bytes(
    inputs: int, outputs: int, kernel: KernelName = "reference", group: int = 32
) -> int:
    """Bytes that a linear takes besides its weights and its result, in any phase: what it needs to
    de-quantize one piece, or the fewest columns there can be. `group` inputs share a scale.

    `ascend` takes little itself, and is planned like `reference`, which takes its place for shapes
    that the operator refuses: that is CANN's for the operator's own workspace. `triton` keeps its
    16-bit weights and the sums that it adds later to as much, so that it runs what streams, and the
    reference what it refuses, within what is planned.
    """
    if kernel in ("reference", "ascend", "triton"):
        columns = min(outputs, max(PIECE_WEIGHTS["reference"] // inputs // 8, 1) * 8)
        # Integers and fp32 of every weight, and of every zero point.
        return 8 * (inputs + inputs // group) * columns + 512
    piece = max(min(PIECE_WEIGHTS[kernel], inputs * outputs), inputs * 64)
    return TAKEN_PER_WEIGHT[kernel] * piece + 4096


def columns_within(inputs: int, outputs: int, group: int, kernel: KernelName) -> int:
    """Outputs that the reference de-quantizes at a time where it takes the place of `kernel`,
    `cpu` or `native`, within the same scratch."""
    room = scratch_bytes(inputs, outputs, kernel, group) - 512
    return max(room // (8 * (inputs + inputs // group)) // 8, 1) * 8


def loading_bytes(inputs: int, outputs: int, group: int, kernel: KernelName) -> int:
    """Bytes that bringing a linear (or several, joined) into the kernel's layout takes, at most,
    besides what is read from the file: the new layout, and one piece on its way there. `ascend`
    turns words where they lie, but tries the operator on a matrix of the shape before; `triton`
    lays joined linears side by side in a copy, which goes back to where they were."""
    if kernel == "reference":
        return 0
    if kernel == "triton":
        return linear_bytes(inputs, outputs, group, kernel) + 2 * outputs + 4096
    if kernel == "ascend":
        return linear_bytes(inputs, outputs, group, kernel) + 8 * (inputs + outputs) + 4096
    piece = max(min(PIECE_WEIGHTS[kernel], inputs * outputs), inputs * 64)
    zeros = 32 * (inputs // group) * outputs
    return linear_bytes(inputs, outputs, group, kernel) + 8 * piece + zeros


def eight_bit_scratch_bytes(inputs: int, outputs: int, itemsize: int = 2) -> int:
    """The same as `scratch_bytes` for 8-bit weights with a scale for every output: weights of the
    activations' type of a piece with their scales, or the sums of parts of the inputs."""
    piece = max(min(EIGHT_BIT_PIECE, inputs * outputs), inputs * 64)
    return itemsize * (piece + piece // inputs)


def rounded_bytes(inputs: int, outputs: int) -> int:
    """Bytes held by 8-bit weights with a scale for every output."""
    return inputs * outputs + outputs * 2


ROUNDED_AT_ONCE = 1 << 20
"""Weights that are rounded to 8 or 4 bits at a time."""


def rounding_rows(inputs: int) -> int:
    """Rows of as many inputs that are rounded at a time; a multiple of every block that weights
    are ordered in."""
    return max(64, min(1024, ROUNDED_AT_ONCE // inputs // 64 * 64))


def rounding_bytes(inputs: int, outputs: int) -> int:
    """Bytes that rounding takes besides what is held, at most: the rows that are being read and
    rounded, a few times over in wider types."""
    return 24 * inputs * min(outputs, rounding_rows(inputs))


HeadBits = Literal[4, 8]
HEAD_GROUP = 32
"""Inputs of one row of a 4-bit head that share a scale and an offset."""

HEAD_OPTIONS: dict[str, HeadBits] = {"head4": 4, "head8": 8}
"""Names of the options that round the head, the faster first."""


class HeadChoice(NamedTuple):
    """The bits that the head is rounded to, or None, and why, in words for the plan."""

    bits: HeadBits | None
    reason: str


def choose_head(
    allow: Collection[str], kernel: KernelName, inputs: int, outputs: int
) -> HeadChoice | None:
    """Whether a head of that shape is rounded where packed linears have `kernel`; None where
    `allow` names neither `head4` nor `head8`."""
    names = [name for name in HEAD_OPTIONS if name in allow]
    if not names:
        return None
    if kernel not in ("cpu", "native", "triton"):
        where = "on the CPU in bfloat16, or on CUDA by own kernels"
        return HeadChoice(None, f"{names[0]} is not used: it is faster {where} only")
    if inputs % HEAD_GROUP or outputs % 64:
        shape = f"{inputs} x {outputs}"
        return HeadChoice(None, f"{names[0]} is not used: a head of {shape} cannot be packed")
    if kernel == "triton" and "head8" not in names:
        return HeadChoice(None, "head4 is not used: on CUDA there is head8")
    name = "head8" if kernel == "triton" else names[0]
    return HeadChoice(HEAD_OPTIONS[name], f"{name}: fewer bytes to read for every token")


def head_bytes(inputs: int, outputs: int, bits: HeadBits) -> int:
    """Bytes held by a rounded head."""
    if bits == 8:
        return rounded_bytes(inputs, outputs)
    return inputs * outputs // 2 + inputs // HEAD_GROUP * outputs * 4
