"""AutoAWQ's own search on a Qwen2 layer, against `published_awq.py`, which stands for it elsewhere.

In float32 on both sides, so that a difference is one of method; its file is made in float16.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from findings import farthest, found, share, stand_in
from torch import Tensor
from torch.func import functional_call
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

stand_in("datasets")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from awq.models.qwen2 import Qwen2AWQForCausalLM  # noqa: E402
from awq.quantize.quantizer import AwqQuantizer  # noqa: E402
from awq.quantize.scale import apply_clip, apply_scale  # noqa: E402
from awq.utils.module import get_named_linears  # noqa: E402
from awq.utils.packing_utils import dequantize_gemm  # noqa: E402
from published_awq import best_scale, clipped, published_awq  # noqa: E402

TOKENS, ITEMS = 128, 6
CONFIG = transformers.Qwen2Config(
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_hidden_layers=1,
)
CONFIG._attn_implementation = "sdpa"

Weights = Mapping[str, Tensor]
INSPECTED = {
    "input_layernorm": "self_attn",
    "post_attention_layernorm": "mlp",
    "mlp.up_proj": "mlp.down_proj",
}
"""What comes before the linears of a scale, and the module whose output judges it."""


class Layer:
    """A Qwen2 layer as `published_awq` wants one, its weights handed in."""

    def __init__(self) -> None:
        self.module = Qwen2DecoderLayer(CONFIG, 0).eval().requires_grad_(False)
        for name, weight in self.module.named_parameters():
            noise = torch.randn_like(weight)
            if weight.dim() > 1:
                heavy = torch.randn_like(weight).abs() > 3
                weight.data = noise / weight.shape[1] ** 0.5 * (1 + 2 * heavy)
            else:
                weight.data = torch.exp(0.5 * noise) if "norm" in name else noise
        rotary = Qwen2RotaryEmbedding(CONFIG)
        positions = torch.arange(TOKENS)[None]
        self.kwargs: dict[str, Any] = {
            "position_ids": positions,
            "attention_mask": None,
            "position_embeddings": rotary(torch.zeros(1), positions),
        }

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in self.module.named_parameters()}

    def through(self, part: str, weights: Weights, x: Tensor) -> Tensor:
        """[T, K] through one part of the layer, or all of it where `part` is empty."""
        module = self.module.get_submodule(part)
        prefix = f"{part}." if part else ""
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        attends = part in ("", "self_attn")
        out = functional_call(module, own, (x[None],), self.kwargs if attends else {})
        return (out[0] if isinstance(out, tuple) else out)[0]

    def attention(self, weights: Weights, x: Tensor) -> tuple[Tensor]:
        return (self.through("self_attn", weights, x),)

    def mlp(self, weights: Weights, x: Tensor) -> tuple[Tensor]:
        return (self.through("mlp", weights, x),)

    def capture(self, weights: Weights, item: int, x: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        hooks = [
            linear.register_forward_hook(
                lambda module, args, out, name=name: seen.__setitem__(name, args[0][0])
            )
            for name, linear in get_named_linears(self.module).items()
        ]
        self.through("", weights, x)
        for hook in hooks:
            hook.remove()
        return seen


def quantizer(layer: Layer, inputs: Tensor, group: int) -> Any:
    """Theirs, past the parts that want a whole model and a data set."""
    made = object.__new__(AwqQuantizer)
    made.__dict__.update(
        w_bit=4,
        group_size=group,
        zero_point=True,
        version="gemm",
        duo_scaling=True,
        n_parallel_calib_samples=None,
        max_chunk_memory=2**30,
        inps=inputs,
        module_kwargs=layer.kwargs,
        awq_model=SimpleNamespace(model_type="qwen2"),
    )
    return made


def inputs(seed: int) -> Tensor:
    """Correlated, about a mean, channels of different size: [items, tokens, 256]."""
    torch.manual_seed(1)
    mix = torch.randn(64, 256) * torch.exp(0.8 * torch.randn(256))
    mean = 0.5 * torch.randn(256)
    torch.manual_seed(seed)
    return torch.randn(ITEMS, TOKENS, 64) @ mix + mean


def check(group: int) -> None:
    torch.manual_seed(0)
    layer, x = Layer(), inputs(2)
    before = layer.weights()
    theirs = quantizer(layer, x, group)
    linears = get_named_linears(layer.module)
    seen = theirs._get_input_feat(layer.module, linears)
    wanted = Qwen2AWQForCausalLM.get_layers_for_scaling(layer.module, seen, layer.kwargs)
    scales = [theirs._search_best_scale(layer.module, **each) for each in wanted]
    ours = {
        previous: best_scale(
            before,
            names,
            list(seen[names[0]]),
            lambda w, i, part=INSPECTED[previous]: layer.through(part, w, i),
            group,
        )
        for previous, names, _ in scales
    }
    their_scales = {previous: found_scale for previous, _, found_scale in scales}
    found(f"scales of _search_best_scale, g{group}", farthest(ours, their_scales), 1e-6)
    apply_scale(layer.module, scales, input_feat_dict=seen)
    clips = theirs._search_best_clip(layer.module, linears, seen)
    off = 0.0
    for name, most in clips:
        weight = linears[name].weight.data
        cut = weight.view(*most.shape[:2], -1).clamp(-most, most).view_as(weight)
        mine = clipped(weight, seen[name].flatten(0, 1), group)
        off = max(off, float((mine != cut).float().mean()))
    found(f"weights that _search_best_clip limits otherwise, share, g{group}", off, 1e-3)
    apply_clip(layer.module, clips)
    theirs._apply_quant(layer.module, linears)
    packed = dict(before)
    for name, linear in layer.module.named_modules():
        if hasattr(linear, "qweight"):
            kept = (linear.qweight, linear.qzeros, linear.scales)
            packed[f"{name}.weight"] = dequantize_gemm(*kept, 4, group).T.float()
        elif name.endswith("layernorm"):
            packed[f"{name}.weight"] = linear.weight.data
    end_to_end(before, list(x), packed, group)


def end_to_end(before: Weights, items: list[Tensor], theirs: Weights, group: int) -> None:
    """The whole of `published_awq`, judged by what the layer then does to unseen inputs."""
    torch.manual_seed(0)
    layer = Layer()
    ours = published_awq(layer, before, items, group)
    linears = [name for name in ours if ours[name].dim() == 2]
    off = max(float((ours[n].half() != theirs[n].half()).float().mean()) for n in linears)
    found(f"weights that its packed layer has otherwise, share, g{group}", off, 1e-3)
    unseen = inputs(3)[0]
    true = layer.through("", before, unseen)
    errors = [share(layer.through("", each, unseen), true) for each in (ours, theirs)]
    apart = abs(errors[0] / errors[1] - 1)
    found(f"held-out error {errors[1]:.4f} of its packed layer, apart, g{group}", apart, 1e-3)


def main() -> None:
    # On a CPU its copies would be the weights themselves, which it changes as it goes.
    to_host = torch.Tensor.cpu
    torch.Tensor.cpu = lambda tensor: to_host(tensor).clone()  # type: ignore[method-assign]
    for group in (128, 32):
        check(group)


if __name__ == "__main__":
    main()
