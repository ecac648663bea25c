"""A tiny transformers model with telling random weights, and the same weights under the names of a
published checkpoint."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from tiny import tiny_config
from torch import Tensor, nn
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

from lowvram.config import OmniConfig

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Oracle:
    """A transformers model, the tensors it saves, and the shape it says it has."""

    model: nn.Module
    tensors: dict[str, Tensor]
    config: OmniConfig

    def find(self, name: str) -> Any:
        """The submodule whose class has this name; where it sits differs between releases."""
        return next(m for m in self.model.modules() if type(m).__name__ == name)

    def part(self, prefix: str, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """The saved tensors under `prefix`, their names relative to it."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix) and name not in without
        }


@functools.lru_cache(maxsize=8)
def oracle(seed: int = 0, **thinker_text: Any) -> Oracle:
    """Build, randomise and save a tiny model; `thinker_text` replaces fields of its text model."""
    raw = tiny_config(**thinker_text)
    text = raw["thinker_config"]["text_config"]
    if "mrope_section" in text:
        text["rope_scaling"]["mrope_section"] = list(text.pop("mrope_section"))
    config = Qwen2_5OmniConfig(**raw)
    model = Qwen2_5OmniForConditionalGeneration(config).eval()
    _randomise(model, seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        saved = json.loads((Path(folder) / "config.json").read_text())
    return Oracle(model, tensors, OmniConfig.from_dict(saved))


def _randomise(model: nn.Module, seed: int) -> None:
    """Weights that would show a mistake: norms away from one, biases away from zero, queries and
    keys large enough for attention to be sharp."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            sharp = any(f"{part}." in name for part in ("q_proj", "k_proj", "attn.q", "attn.k"))
            weight.data = noise * ((2.0 if sharp else 1.2) / math.sqrt(weight[0].numel()))
        elif name.endswith("bias"):
            weight.data = 0.3 * noise
        else:
            weight.data = 1 + 0.3 * noise


def loaded(build: Any, tensors: dict[str, Tensor]) -> Any:
    """A module built without storage and given these tensors: no name missing, none left over."""
    with torch.device("meta"):
        module = build()
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval()


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    if ours.numel():
        scale = max(1.0, theirs.abs().max().item())
        error = (ours - theirs).abs().max().item() / scale
        assert error <= tolerance, f"off by {error:.2e}"
