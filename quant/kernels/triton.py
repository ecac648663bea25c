"""CUDA, by kernels in Triton, from the weights as they lie in the file.

Nothing is brought into another layout: what arrives from disk or host runs as it is. While
decoding, few rows are multiplied by the 4-bit weights themselves, with sums in fp32 and no weight
rounded; in prefill, and for more rows, weights become 16-bit in the scratch, some columns at a
time, and cuBLAS multiplies. Rows choose between kernels in decoding alone, where they come from the
request and not from how a prompt is cut.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..phase import Phase
from ..scratch import Scratch
from ..sizes import PIECE_WEIGHTS
from ..triton import lacking, too_old
from . import Problem, reference
from .pieces import by_pieces, piece_columns

JOINS = {"qweight": 1, "qzeros": 1, "scales": 1}

GROUPS = (32, 64, 128)
DOT_ROWS = 64
DTYPES = (torch.float16, torch.bfloat16)
PHASES: tuple[Phase, Phase] = ("decode", "prefill")


def refusal(problem: Problem) -> str | None:
    """Why this kernel cannot do `problem`; None if it can."""
    if problem.dtype not in DTYPES:
        return f"activations are in float16 or bfloat16, not in {problem.dtype}"
    if problem.outputs % 8 or problem.group not in GROUPS or problem.inputs % problem.group:
        return (
            f"{problem.inputs} inputs in groups of {problem.group} and {problem.outputs} outputs "
            "are not packed as it reads them"
        )
    return unusable(problem.dtype)


def unusable(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot be used on this machine's device; None if they can."""
    refused = lacking()
    if refused is not None:
        return refused
    if not torch.cuda.is_available():
        return "CUDA cannot be used on this machine"
    torch.cuda.init()
    return too_old() or small_trial(str(dtype).removeprefix("torch."))


def small_trial(dtype: str) -> str | None:
    """What was wrong with a small product on the device that is open, tried once for a type of
    activations; None if it came out right.

    Raises:
        torch.OutOfMemoryError: there is no room to try.
    """
    return _failed(getattr(torch, dtype), torch.device("cuda", torch.cuda.current_device()))


def prepare(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int) -> dict[str, Tensor]:
    """It computes from the stored tensors as they are."""
    return reference.prepare(qweight, qzeros, scales, group)


def run(
    x: Tensor,
    held: dict[str, Tensor],
    bias: Tensor | None,
    group: int,
    phase: Phase,
    scratch: Scratch,
) -> Tensor:
    """x 16-bit [M, K] -> [M, N] of that type."""
    from ..triton import products

    stored = held["qweight"], held["qzeros"], held["scales"]
    if phase == "decode" and len(x) <= DOT_ROWS:
        return products.product(x, *stored, bias, group, scratch)
    inputs, outputs = x.shape[1], stored[2].shape[1]

    def weights(columns: slice) -> Tensor:
        shape = (inputs, columns.stop - columns.start)
        (out,) = scratch.take(x.device, (shape, x.dtype))
        return products.unpacked(*stored, group, columns, out)

    # As many bytes as the reference kernel takes, of which a weight is eight.
    step = 4 * piece_columns(PIECE_WEIGHTS["triton"], inputs, 8)
    return by_pieces(x, outputs, step, weights, bias)


def gated(
    x: Tensor, held: dict[str, Tensor], bias: Tensor | None, group: int, scratch: Scratch
) -> Tensor:
    """[M, K] -> `silu(first half) * second half` of the outputs, [M, N / 2]; rounded where the
    operations one by one would be."""
    from ..triton import products, tuning

    outputs = held["scales"].shape[1]
    if len(x) <= DOT_ROWS and tuning.most_splits(x.shape[1], outputs, group, len(x)):
        stored = held["qweight"], held["qzeros"], held["scales"]
        return products.product(x, *stored, bias, group, scratch, gated=True)
    opened, passed = run(x, held, bias, group, "decode", scratch).chunk(2, dim=1)
    return F.silu(opened).mul_(passed)


@cache
def _failed(dtype: torch.dtype, device: torch.device) -> str | None:
    """A compiler that does not start, a driver that does not know what it made, a result that is
    none."""
    inputs, outputs, group = 256, 64, 32
    random = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (inputs, outputs // 8), generator=random)
    zeros = torch.randint(-(2**31), 2**31, (inputs // group, outputs // 8), generator=random)
    scales = torch.rand(inputs // group, outputs, generator=random).half()
    x = torch.randn(1, inputs, generator=random).to(dtype)
    stored = prepare(words.int(), zeros.int(), scales, group)
    read = stored["qweight"], stored["qzeros"], stored["scales"]
    wanted = x.float() @ reference.dequantize(*read, group)
    try:
        there = {name: tensor.to(device) for name, tensor in stored.items()}
        found = [run(x.to(device), there, None, group, phase, Scratch()) for phase in PHASES]
        products = torch.cat(found).float().cpu()
    except torch.OutOfMemoryError:
        raise  # which says nothing about the kernels
    except Exception as error:  # what compilers and drivers raise is of no common kind
        said = str(error).strip().splitlines() or [""]
        return f"a small product failed: {type(error).__name__}: {said[0][:200]}"
    if torch.allclose(
        products, wanted.expand(2, -1), rtol=0.02, atol=0.02 * float(wanted.abs().max())
    ):
        return None
    return "a small product came out wrong"
