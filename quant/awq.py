"""One decoder layer into four bits."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from lowvram.errors import CheckpointError

from .search_grid import Coded, Rounding, full_range, nearest
from .search_layer import (
    LINEARS,
    Capture,
    Forward,
    Geometry,
    LayerInputs,
    LayerResult,
    LinearReport,
    SearchSettings,
    Weights,
)


def quantize_layer(
    weights: Weights,
    forward: Forward | None,
    capture: Capture | None,
    inputs: LayerInputs | None,
    geometry: Geometry,
    settings: SearchSettings,
    *,
    rounding: Rounding = nearest,
) -> LayerResult:
    """Pack the linears of a layer.

    Args:
        weights: all tensors of the layer, 16- or 32-bit.
        forward, capture, inputs: the layer and its calibration inputs; without inputs (None, or no
            item) only ranges are searched, by the error of the weights themselves.
        geometry: how value channels belong to query heads.
        rounding: how weights are put onto the grid that was found.

    Raises `CheckpointError` for a missing tensor, a shape that cannot be packed or a value that is
    no number.
    """
    begun = time.perf_counter()
    _check(weights, settings.group_size)
    tensors: dict[str, Tensor] = {}
    reports: list[LinearReport] = []
    for linear in LINEARS:
        weight = weights[f"{linear}.weight"].float()
        grid = full_range(weight, settings.group_size)
        coded = Coded(rounding(weight, grid), grid)
        tensors |= {f"{linear}.{name}": tensor for name, tensor in coded.stored().items()}
        error = float((coded.dense() - weight).square().sum() / weight.square().sum())
        reports.append(LinearReport(linear, error, error, 0.0))
    packed = {f"{linear}.weight" for linear in LINEARS}
    for name, tensor in weights.items():
        if name not in packed:
            tensors[name] = tensor.to("cpu", settings.dtype)
    seconds = time.perf_counter() - begun
    return LayerResult(tensors, tuple(reports), (), None, None, seconds)


def dense_layer(tensors: Mapping[str, Tensor], group_size: int) -> dict[str, Tensor]:
    """A packed layer's tensors -> the float32 weights a reader computes with, as `forward` takes
    them."""
    from .kernels.reference import dequantize

    dense: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        linear, _, kind = name.rpartition(".")
        if linear not in LINEARS or kind == "bias":
            dense[name] = tensor.float()
        elif kind == "qweight":
            stored = (tensor, tensors[f"{linear}.qzeros"], tensors[f"{linear}.scales"])
            dense[f"{linear}.weight"] = dequantize(*stored, group_size).T
    return dense


def _check(weights: Weights, group: int) -> None:
    """Every linear is there, can be packed, and holds numbers only."""
    for linear in LINEARS:
        name = f"{linear}.weight"
        if name not in weights:
            raise CheckpointError(f"the layer has no {name}; wanted a Qwen2.5 decoder layer")
        outputs, columns = weights[name].shape
        if outputs % 8 or columns % group:
            raise CheckpointError(
                f"{name} has shape {[outputs, columns]}; wanted outputs in eights and inputs in "
                f"groups of {group}: try a smaller group size"
            )
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} holds values that are no finite numbers")
