"""What is launched for a product: tiles from the table, partial sums into the scratch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from ..scratch import Scratch
from . import tuning
from .dot import four_bits_by_tiles
from .gemv import four_bits
from .reduce import add_parts
from .rows import eight_bits
from .unpack import to_16_bits

INTERPRETED_PROCESSORS = 8
"""What the CPU counts as where kernels are interpreted: few enough that some products are split."""


def product(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group: int,
    scratch: Scratch,
    *,
    gated: bool = False,
) -> Tensor:
    """x 16-bit [M, K] of at most 64 rows times stored weights -> [M, N], or [M, N / 2] where the
    first half of the outputs opens the second; sums in fp32, rounded once, with the bias."""
    rows = x.contiguous()
    (count, inputs), outputs = rows.shape, scales.shape[1]
    groups, words = inputs // group, outputs // 8
    small = count <= tuning.GEMV_ROWS
    tile = tuning.gemv(count, outputs, group) if small else tuning.dot(count, group)
    tiles = -(-words // tile.words)
    most = tuning.most_splits(inputs, outputs, group, count)
    splits, each = tuning.splits(tiles, groups, _processors(x.device), most)
    direct = splits == 1 and not gated
    out = rows.new_empty(count, outputs // 2 if gated else outputs)
    parts = out if direct else _parts(scratch, x.device, splits, count, outputs)
    kernel = four_bits if small else four_bits_by_tiles
    constants = {"warps": tuning.WARPS} | tile._asdict()
    warps = constants.pop("warps")
    with _on(x.device):
        kernel[tiles, splits](
            rows,
            qweight,
            qzeros,
            scales,
            bias if direct else None,
            parts,
            count,
            inputs,
            words,
            groups,
            each,
            GROUP=group,
            DIRECT=direct,
            num_warps=warps,
            **{name.upper(): value for name, value in constants.items()},
        )
        if not direct:
            _add(parts, bias, out, gated)
    return out


def product_of_bytes(
    x: Tensor, weights: Tensor, scales: Tensor, bias: Tensor | None, scratch: Scratch
) -> Tensor:
    """x 16-bit [M, K] of at most eight rows times int8 [N, K], row by row times 16-bit [N] ->
    [M, N]."""
    rows = x.contiguous()
    (count, inputs), outputs = rows.shape, len(weights)
    tile = tuning.rows(count)
    tiles, steps = -(-outputs // tile.outputs), -(-inputs // tile.inputs)
    most = tuning.most_byte_splits(inputs, outputs, count)
    splits, each = tuning.splits(tiles, steps, _processors(x.device), most)
    out = rows.new_empty(count, outputs)
    direct = splits == 1
    parts = out if direct else _parts(scratch, x.device, splits, count, outputs)
    constants = {name.upper(): value for name, value in tile._asdict().items()}
    with _on(x.device):
        eight_bits[tiles, splits](
            rows,
            weights,
            scales,
            bias if direct else None,
            parts,
            count,
            inputs,
            outputs,
            each * tile.inputs,
            DIRECT=direct,
            num_warps=tuning.WARPS,
            **constants,
        )
        if not direct:
            _add(parts, bias, out, gated=False)
    return out


def unpacked(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int, columns: slice, out: Tensor
) -> Tensor:
    """Some outputs of stored weights into `out`, 16-bit [K, n]; `columns` in eights."""
    inputs, words = qweight.shape
    first, width = columns.start // 8, (columns.stop - columns.start) // 8
    tile = tuning.UNPACK
    with _on(qweight.device):
        to_16_bits[-(-width // tile.words), inputs // tile.inputs](
            qweight,
            qzeros,
            scales,
            out,
            first,
            width,
            words,
            GROUP=group,
            INPUTS=tile.inputs,
            WORDS=tile.words,
            LARGEST=torch.finfo(out.dtype).max,
            num_warps=tuning.WARPS,
        )
    return out


def _parts(scratch: Scratch, device: torch.device, splits: int, count: int, outputs: int) -> Tensor:
    (parts,) = scratch.take(device, ((splits, count, outputs), torch.float32))
    return parts


def _add(parts: Tensor, bias: Tensor | None, out: Tensor, gated: bool) -> None:
    splits, count, outputs = parts.shape
    add_parts[-(-out.shape[1] // tuning.REDUCED), count](
        parts,
        bias,
        out,
        count,
        outputs,
        splits,
        BLOCK=tuning.REDUCED,
        GATED=gated,
        LARGEST=torch.finfo(out.dtype).max,
    )


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its tensors lie on."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)
