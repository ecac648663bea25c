"""Input scales of linears, and the exact folding of their inverses into what comes before.

A linear computes the same from `x / s` with its columns times s. The division is folded into the
normalization before q, k, v and before gate, up; into the rows of v before o, where the query
heads that share a key/value head share its channels' scales; and into the rows of up before down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .search_layer import LINEARS, Geometry, Weights

GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate-up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linears with one input, in the order in which they are searched."""

GROUP_OF = {linear: group for group, linears in GROUPS.items() for linear in linears}

NORMS = {"qkv": "input_layernorm.weight", "gate-up": "post_attention_layernorm.weight"}
"""Group -> the normalization before it."""

PRODUCERS = {"self_attn.v_proj": "o", "mlp.up_proj": "down"}
"""Linear -> the group that reads each of its outputs, times something."""

_NEAR = 0.01
"""How far a scale is moved at most, as a share: bfloat16 rounds by 1/512."""


@dataclass(frozen=True)
class Fold:
    """A layer's weights with input scales (float32, by group) folded in; a group may have none.

    The scale of "o" has a value for each channel of the key/value heads.
    """

    weights: Weights
    geometry: Geometry
    dtype: torch.dtype
    """Of the norms and biases as they will be stored."""
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    def with_scale(self, group: str, scale: Tensor | None) -> Fold:
        """The fold with another scale for that group (None: no scale).

        A stored norm or bias has few bits. The scale is moved to what it was really divided by, at
        most half a bit away, so that its rounding changes nothing.
        """
        scales = {name: s for name, s in self.scales.items() if name != group}
        if scale is not None:
            scales[group] = self._exact(group, scale)
        return replace(self, scales=scales)

    def columns(self, group: str) -> Tensor | None:
        """What each input of the group's linears is divided by, [K]."""
        scale = self.scales.get(group)
        if scale is None or group != "o":
            return scale
        return expand(scale, self.geometry)

    def rows(self, linear: str) -> Tensor | None:
        """What each output of the linear is divided by, [N]."""
        return self.scales.get(PRODUCERS[linear]) if linear in PRODUCERS else None

    def weight(self, linear: str) -> Tensor:
        """The linear's weights, columns and rows scaled: float32 [N, K], a tensor of its own."""
        weight = self.weights[f"{linear}.weight"].to(torch.float32, copy=True)
        columns, rows = self.columns(GROUP_OF[linear]), self.rows(linear)
        if columns is not None:
            weight.mul_(columns)
        return weight if rows is None else weight.div_(rows.unsqueeze(1))

    def others(self) -> dict[str, Tensor]:
        """Everything but the linears' weights, as it will be stored."""
        divisors = {name: self.scales.get(group) for group, name in NORMS.items()}
        divisors |= {f"{linear}.bias": self.rows(linear) for linear in PRODUCERS}
        packed = {f"{linear}.weight" for linear in LINEARS}
        found: dict[str, Tensor] = {}
        for name, tensor in self.weights.items():
            divisor = divisors.get(name)
            if divisor is not None:
                tensor = tensor.float() / divisor
            if name not in packed:
                found[name] = tensor.to(self.dtype)
        return found

    def _exact(self, group: str, scale: Tensor) -> Tensor:
        if group in NORMS:
            # What cannot be divided (a norm of 0, a quotient out of range) has no scale.
            divided, otherwise = self.weights[NORMS[group]].float(), torch.ones_like(scale)
        elif group == "o" and "self_attn.v_proj.bias" in self.weights:
            divided, otherwise = self.weights["self_attn.v_proj.bias"].float(), scale
        else:
            return scale
        exact = divided / (divided / scale).to(self.dtype).float()
        return torch.where((exact / scale - 1).abs() < _NEAR, exact, otherwise)


def expand(scale: Tensor, geometry: Geometry) -> Tensor:
    """Values of key/value channels [kv_heads * d] -> of the query heads that read them."""
    shared = geometry.heads // geometry.kv_heads
    return scale.view(geometry.kv_heads, 1, -1).expand(-1, shared, -1).reshape(-1)


def tie(values: Tensor, geometry: Geometry) -> Tensor:
    """Means over the query heads that share a key/value head: [heads * d] -> [kv_heads * d]."""
    return values.view(geometry.kv_heads, -1, geometry.head_dim).mean(1).reshape(-1)
