"""What the other readers are given: a checkpoint quantized here, its text model under plain names,
and the logits that this package's engine has for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowvram.config import OmniConfig
from lowvram.models import KVCache, ThinkerText, dense
from lowvram.pocket import make_checkpoint
from lowvram.quant import QuantLinear, dequantize
from lowvram.quantize import QuantizeSettings, quantize_checkpoint

TOKENS = 64
STORED = ("qweight", "qzeros", "scales")
TEXT = ("thinker.model.", "thinker.lm_head.")


@dataclass(frozen=True)
class Made:
    """Folders and files of one group size."""

    group: int
    omni: Path
    """The finished folder of `quantize-checkpoint`."""
    text: Path
    """Its text model as `Qwen2ForCausalLM`: the same tensors under names without `thinker.`."""
    expected: Path
    """Tokens, logits of the de-quantized twin in float32, of the checkpoint before it was
    quantized (`unquantized`), and each packed linear as dense float32."""


def make(folder: Path, group: int) -> Made:
    """Quantize the built-in model by search and compute what readers should find."""
    source = make_checkpoint(folder / f"source-g{group}", dtype="float16")
    made = Made(
        group,
        folder / f"omni-g{group}",
        folder / f"text-g{group}",
        folder / f"expected-g{group}.safetensors",
    )
    settings = QuantizeSettings(device="cpu", samples=6, seq_len=128, group_size=group)
    quantize_checkpoint(source, made.omni, settings)
    raw = json.loads((made.omni / "config.json").read_text())
    tensors = text_tensors(made.omni)
    _write_text_model(made.text, raw, tensors)
    config = OmniConfig.from_dict(raw)
    twin = unpacked(tensors, group)
    tokens = torch.arange(7, 7 + TOKENS) % config.thinker.text.vocab_size
    expected = {name: twin[name].contiguous() for name in twin if _was_packed(tensors, name)}
    expected |= {
        "tokens": tokens,
        "logits": logits(config, twin, tokens),
        "unquantized": logits(config, text_tensors(source), tokens),
        "packed": logits(config, tensors, tokens, group),
    }
    save_file(expected, made.expected)
    return made


def text_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the Thinker's text model, named as after `thinker.`."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return {
        name.removeprefix("thinker."): tensor
        for name, tensor in found.items()
        if name.startswith(TEXT)
    }


def unpacked(tensors: dict[str, Tensor], group: int) -> dict[str, Tensor]:
    """Packed linears replaced by float32 weights [N, K]; everything else as it is."""
    out = {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in STORED}
    for name in tensors:
        linear, _, kind = name.rpartition(".")
        if kind == "qweight":
            stored = (tensors[f"{linear}.{kind}"].numpy() for kind in STORED)
            out[f"{linear}.weight"] = torch.from_numpy(dequantize(*stored, group)).T
    return out


def logits(
    config: OmniConfig, tensors: dict[str, Tensor], tokens: Tensor, group: int | None = None
) -> Tensor:
    """float32 [T, V] of the engine's own text model; with `group`, on packed linears."""

    def linear(name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
        if group is None or name.endswith("lm_head"):
            return dense(name, inputs, outputs, bias)
        return QuantLinear(inputs, outputs, bias, group, dtype=torch.float32)

    weights = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    embedding = weights.pop("model.embed_tokens.weight")
    model = ThinkerText(config.thinker, linear).eval()
    if group is not None:
        weights = {n: t.half() if n.endswith("scales") else t for n, t in weights.items()}
    model.load_state_dict(weights)
    text = config.thinker.text
    shape = (text.num_hidden_layers, 1, text.num_key_value_heads, len(tokens), text.head_dim)
    cache = KVCache(*shape, torch.float32, "cpu")
    positions = torch.arange(len(tokens)).expand(3, 1, -1)
    with torch.inference_mode():
        rope = model.model.rope(positions, torch.float32)
        hidden = model.model(embedding[tokens][None], rope, cache, 0)
        return model.logits(hidden[0]).clone()


def share(out: Tensor, true: Tensor) -> float:
    """How far `out` is from `true`, as a share of it."""
    return float((out - true).norm() / true.norm())


def _write_text_model(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir()
    text = dict(raw["thinker_config"]["text_config"])
    text.pop("rope_scaling")
    config = text | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "quantization_config": raw["quantization_config"],
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _was_packed(tensors: dict[str, Tensor], name: str) -> bool:
    return f"{name.removesuffix('.weight')}.qweight" in tensors
