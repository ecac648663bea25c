"""AWQ as AutoAWQ 0.2.9 publishes it, written anew in float32 as the yardstick for our search.

Twenty ratios with both magnitudes and no plain candidate; loss on the module's output; the output
projection is left out for grouped-query attention; the ends of the ranges are shrunk together, and
not for q and k. All searches see the layer as it was; the file is rounded in float16. `make
interop` holds each step against the package itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

RATIOS = 20
SHRINKS = 10
CLIP_TOKENS = 512

Module = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def on_grid(weight: Tensor, group: int) -> Tensor:
    """Weights [N, K] rounded to four bits, as the searches see them."""
    return _rounded(weight.reshape(-1, group))[0].view_as(weight)


def as_stored(weight: Tensor, group: int) -> Tensor:
    """Float32 values of the file that it makes of weights [N, K]: rounded twice, in float16."""
    first, steps, zeros = _rounded(weight.half().reshape(-1, group))
    q = torch.round((first + zeros * steps) / steps)
    return ((q.float() - zeros.float()) * steps.float()).view_as(weight)


def _rounded(grouped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Groups [.., g] -> the nearest of their sixteen values, steps and zero points."""
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    steps = (high - low).clamp(min=1e-5) / 15
    zeros = (-torch.round(low / steps)).clamp(0, 15)
    q = (torch.round(grouped / steps) + zeros).clamp(0, 15)
    return (q - zeros) * steps, steps, zeros


def best_scale(
    weights: Mapping[str, Tensor],
    linears: Sequence[str],
    inputs: Sequence[Tensor],
    module: Module,
    group: int,
) -> Tensor:
    """The scale [K] of linears with one input that changes the module's output least."""
    stacked = torch.cat([weights[f"{name}.weight"] for name in linears])
    grouped = stacked.abs().view(-1, group)
    w_mean = (grouped / (grouped.amax(1, keepdim=True) + 1e-6)).view_as(stacked).mean(0)
    x_mean = torch.cat(list(inputs)).abs().mean(0)
    true = [module(weights, x) for x in inputs]
    best, least = torch.ones_like(x_mean), float("inf")
    for step in range(RATIOS):
        ratio = step / RATIOS
        scale = (x_mean**ratio / (w_mean ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        changed = dict(weights)
        for name in linears:
            changed[f"{name}.weight"] = on_grid(weights[f"{name}.weight"] * scale, group) / scale
        pairs = zip(inputs, true, strict=True)
        loss = sum(float((module(changed, x) - y).square().sum()) for x, y in pairs)
        if loss < least:
            best, least = scale, loss
    return best


def clipped(weight: Tensor, x: Tensor, group: int) -> Tensor:
    """Weights [N, K] within the symmetric limits that change each group's share least."""
    x = x[:: max(1, len(x) // CLIP_TOKENS)].view(
        len(x[:: max(1, len(x) // CLIP_TOKENS)]), -1, group
    )
    grams = torch.einsum("tgi,tgj->gij", x, x)
    grouped = weight.view(len(weight), -1, group)
    most = grouped.abs().amax(-1, keepdim=True)
    best, least = most.clone(), torch.full_like(most, float("inf"))
    for step in range(SHRINKS):
        limit = most * (1 - step / (2 * SHRINKS))
        change = on_grid(grouped.clamp(-limit, limit), group) - grouped
        error = torch.einsum("ngi,gij,ngj->ng", change, grams, change).unsqueeze(-1)
        best = torch.where(error < least, limit, best)
        least = torch.minimum(error, least)
    return grouped.clamp(-best, best).view_as(weight)


def published_awq(
    layer: Any, weights: Mapping[str, Tensor], items: Sequence[Tensor], group: int
) -> dict[str, Tensor]:
    """A `decoder_layer.Layer`'s weights -> the float32 weights its packed file would stand for."""
    captured = [layer.capture(weights, i, x) for i, x in enumerate(items)]
    seen = {name: [each[name] for each in captured] for name in captured[0]}
    attention, mlp = "self_attn.{}_proj", "mlp.{}_proj"
    qkv, gate_up = [attention.format(x) for x in "qkv"], [mlp.format(x) for x in ("gate", "up")]
    down = [mlp.format("down")]

    def through(name: str) -> Module:
        return lambda w, x: x @ w[f"{name}.weight"].T

    found = {
        "input_layernorm.weight": (qkv, lambda w, x: layer.attention(w, x)[0]),
        "post_attention_layernorm.weight": (gate_up, lambda w, x: layer.mlp(w, x)[0]),
        "mlp.up_proj.weight": (down, through(down[0])),
    }
    scales = {
        before: best_scale(weights, linears, seen[linears[0]], module, group)
        for before, (linears, module) in found.items()
    }
    out = dict(weights)
    inputs = {name: torch.cat(each) for name, each in seen.items()}
    for before, (linears, _) in found.items():
        scale = scales[before]
        out[before] = out[before] / (scale if out[before].dim() == 1 else scale.unsqueeze(1))
        for name in linears:
            out[f"{name}.weight"] = out[f"{name}.weight"] * scale
            inputs[name] = inputs[name] / scale
    for name, x in inputs.items():
        weight = out[f"{name}.weight"]
        if name[-6] not in "qk":
            weight = clipped(weight, x, group)
        out[f"{name}.weight"] = as_stored(weight, group)
    return out
