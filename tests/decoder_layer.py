"""A decoder layer in plain torch, as the search for scales is handed one, and its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram.quant import Geometry, LayerResult, SearchSettings, quantize_layer

Weights = Mapping[str, Tensor]

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


GEOMETRY = Geometry(heads=4, kv_heads=2, head_dim=64)


class Items(list[Tensor]):
    """Calibration inputs in memory; the last `held` of them are for judging."""

    def __init__(self, items: list[Tensor], held: int = 1) -> None:
        super().__init__(items)
        self.held_out = frozenset(range(len(items) - held, len(items)))


@dataclass(frozen=True)
class Layer:
    """Grouped-query attention with biases on q, k, v; a gated MLP; no rotary positions."""

    hidden: int = 256
    inner: int = 512
    geometry: Geometry = GEOMETRY

    def weights(self, seed: int = 0) -> dict[str, Tensor]:
        """Random weights with some heavy outputs and some heavy single values."""
        draw = torch.Generator().manual_seed(seed)
        of_head = self.geometry.head_dim
        q, kv = self.geometry.heads * of_head, self.geometry.kv_heads * of_head
        shapes = {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }
        weights: dict[str, Tensor] = {}
        for name, (outputs, inputs) in shapes.items():
            weight = torch.randn(outputs, inputs, generator=draw) / inputs**0.5
            heavy = torch.randn(outputs, inputs, generator=draw).abs() > 3
            weights[f"{name}.weight"] = weight * (1 + 1.5 * heavy)
            if name[-6] in "qkv":
                weights[f"{name}.bias"] = torch.randn(outputs, generator=draw)
        for name in NORMS:
            weights[name] = torch.exp(0.7 * torch.randn(self.hidden, generator=draw))
        return weights

    def inputs(self, items: int, tokens: int = 128, *, seed: int = 1) -> list[Tensor]:
        """Correlated inputs about a mean, their channels of very different size."""
        draw = torch.Generator().manual_seed(0)
        mix = torch.randn(self.hidden // 4, self.hidden, generator=draw)
        mix *= torch.exp(0.8 * torch.randn(self.hidden, generator=draw)) / len(mix) ** 0.5
        mean = 0.5 * torch.randn(self.hidden, generator=draw)
        draw.manual_seed(seed)
        return [torch.randn(tokens, len(mix), generator=draw) @ mix + mean for _ in range(items)]

    def attention(self, weights: Weights, h: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized input -> output, and the input of the output projection."""
        q, k, v = (
            F.linear(h, weights[f"self_attn.{x}_proj.weight"], weights[f"self_attn.{x}_proj.bias"])
            .unflatten(-1, (-1, self.geometry.head_dim))
            .transpose(0, 1)
            for x in "qkv"
        )
        shared = self.geometry.heads // self.geometry.kv_heads
        k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        mixed = mixed.transpose(0, 1).flatten(1)
        return F.linear(mixed, weights["self_attn.o_proj.weight"]), mixed

    def mlp(self, weights: Weights, h: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized input -> output, and the input of the down projection."""
        gate = F.silu(F.linear(h, weights["mlp.gate_proj.weight"]))
        product = gate * F.linear(h, weights["mlp.up_proj.weight"])
        return F.linear(product, weights["mlp.down_proj.weight"]), product

    def forward(self, weights: Weights, item: int, x: Tensor) -> Tensor:
        return self._run(weights, x)[0]

    def capture(self, weights: Weights, item: int, x: Tensor, last: str = "") -> dict[str, Tensor]:
        return self._run(weights, x)[1]

    def error(self, weights: Weights, changed: Weights, items: list[Tensor]) -> float:
        """Energy of the change of the outputs, as a share of what the layer adds."""
        change = energy = 0.0
        for i, x in enumerate(items):
            true = self.forward(weights, i, x)
            energy += float((true - x).square().sum())
            change += float((self.forward(changed, i, x) - true).square().sum())
        return change / energy

    def quantized(
        self, weights: Weights, items: list[Tensor] | None, settings: SearchSettings | None = None
    ) -> LayerResult:
        """Such weights packed; the last two items judge."""
        inputs = None if items is None else Items(items, 2)
        calls = weights, self.forward, self.capture, inputs, self.geometry
        return quantize_layer(*calls, settings or SearchSettings())

    def _run(self, weights: Weights, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        attended = _norm(x, weights[NORMS[0]])
        out, mixed = self.attention(weights, attended)
        x = x + out
        normalized = _norm(x, weights[NORMS[1]])
        out, product = self.mlp(weights, normalized)
        captured = {f"self_attn.{name}_proj": attended for name in "qkv"}
        captured |= {"self_attn.o_proj": mixed, "mlp.down_proj": product}
        captured |= {"mlp.gate_proj": normalized, "mlp.up_proj": normalized}
        return x + out, captured


LAYER = Layer()


def awkward(kind: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A layer and inputs of which something is the matter."""
    weights, items = LAYER.weights(), LAYER.inputs(4, 48)
    gate = weights["mlp.gate_proj.weight"]
    if kind == "dead channel":
        weights[NORMS[0]][5] = weights[NORMS[1]][5] = 0
        weights["mlp.up_proj.weight"][9] = 0
        weights["self_attn.v_proj.weight"][:64] = 0
        weights["self_attn.v_proj.bias"][:64] = 0
    elif kind == "outlier in a weight":
        gate[3, 7] = weights["self_attn.o_proj.weight"][0, 0] = 1e4
    elif kind == "a step beyond float16":
        gate[3, 7] = 3e6
    elif kind == "outlier in an input":
        for x in items:
            x[0, 11] = 1e4
    elif kind == "constants":
        gate[0], gate[1], gate[2], gate[3] = 0.25, -3.0, 0.0, 1e-7
        weights["mlp.down_proj.weight"][:, :128] = 2.0
    elif kind == "an input that overflowed":
        items[0][3, 4] = float("inf")
    else:
        items = [torch.zeros_like(x) for x in items]
    return weights, items


AWKWARD = (
    "dead channel",
    "outlier in a weight",
    "a step beyond float16",
    "outlier in an input",
    "constants",
    "an input that overflowed",
    "no signal",
)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
