"""Input scales of linears, and the exact folding of their inverses into what comes before.

A linear computes the same from `x / s` with its columns times s. The division is folded into the
normalization before q, k, v and before gate, up; into the rows of v before o, where the query
heads that share a key/value head share its channels' scales; and into the rows of up before down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Fold:
    """A layer's weights with input scales (float32, by group) folded in; a group may have none.

    The scale of "o" has a value for each channel of the key/value heads.
    """

    weights: Weights
    geometry: Geometry
    scales: Mapping[str, Tensor]
    dtype: torch.dtype
    """Of the norms and biases as they will be stored."""

    def with_scale(self, group: str, scale: Tensor | None) -> Fold:
        others = {name: s for name, s in self.scales.items() if name != group}
        return replace(self, scales=others if scale is None else {**others, group: scale})

    def columns(self, group: str) -> Tensor | None:
        """What each input of the group's linears is divided by, [K].

        A stored normalization has few bits; what it was really divided by is told from it, so that
        its rounding changes nothing.
        """
        scale = self.scales.get(group)
        if scale is None:
            return None
        if group == "o":
            return expand(scale, self.geometry)
        if group in NORMS:
            norm = self.weights[NORMS[group]].float()
            stored = self._norm(group)
            return torch.where(stored == 0, torch.ones_like(norm), norm / stored)
        return scale

    def weight(self, linear: str) -> Tensor:
        """The linear's weights, columns and rows scaled: float32 [N, K], a tensor of its own."""
        weight = self.weights[f"{linear}.weight"].to(torch.float32, copy=True)
        columns = self.columns(GROUP_OF[linear])
        if columns is not None:
            weight.mul_(columns)
        rows = self.rows(linear)
        return weight if rows is None else weight.div_(rows.unsqueeze(1))

    def rows(self, linear: str) -> Tensor | None:
        """What each output of the linear is divided by, [N]."""
        return self.scales.get(PRODUCERS[linear]) if linear in PRODUCERS else None

    def others(self) -> dict[str, Tensor]:
        """Everything but the linears' weights, as it will be stored."""
        packed = {f"{linear}.weight" for linear in LINEARS}
        changed = {name: self._norm(group) for group, name in NORMS.items() if group in self.scales}
        for linear in PRODUCERS:
            bias, rows = f"{linear}.bias", self.rows(linear)
            if bias in self.weights and rows is not None:
                changed[bias] = self.weights[bias].float() / rows
        return {
            name: changed.get(name, tensor).to(self.dtype)
            for name, tensor in self.weights.items()
            if name not in packed
        }

    def _norm(self, group: str) -> Tensor:
        """The normalization before the group as stored, float32."""
        norm = self.weights[NORMS[group]].float()
        stored = (norm / self.scales[group]).to(self.dtype).float()
        # A value that the division would bring out of the stored type's range is left as it is.
        kept = torch.isfinite(stored) & (stored != 0)
        return torch.where(kept, stored, norm)


def expand(scale: Tensor, geometry: Geometry) -> Tensor:
    """Values of key/value channels [kv_heads * d] -> of the query heads that read them."""
    shared = geometry.heads // geometry.kv_heads
    return scale.view(geometry.kv_heads, 1, -1).expand(-1, shared, -1).reshape(-1)


def tie(values: Tensor, geometry: Geometry) -> Tensor:
    """Means over the query heads that share a key/value head: [heads * d] -> [kv_heads * d]."""
    return values.view(geometry.kv_heads, -1, geometry.head_dim).mean(1).reshape(-1)
