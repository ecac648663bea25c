"""How much of a small trained Thinker four bits keep: 16-bit, rounded, AutoAWQ's algorithm, ours.

    python benchmarks/quality.py FOLDER --json benchmarks/results/quality-2026-11-21.json

The first run trains the model and keeps it in FOLDER. All methods calibrate with the same tokens.
Ours goes layer by layer as `quantize-checkpoint` does, each layer fed by the quantized ones before
it; AutoAWQ's algorithm by the 16-bit ones, as published. A layer's error is the energy of the
change of its output as a share of the energy of what the layer adds, on held-out text, with the
same inputs for every method: those that the 16-bit model gives it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_model import CONFIG, LENGTH, Trained, trained
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from lowvram.models.kv_cache import KVCache
from lowvram.models.linear import dense
from lowvram.models.rope import mrope
from lowvram.models.text import DecoderLayer
from lowvram.quant import Geometry, SearchSettings, dense_layer, quantize_layer
from lowvram.quantize.front import held_out
from lowvram.quantize.layer import LayerRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from published_awq import published_awq

Weights = dict[str, Tensor]

GEOMETRY = Geometry(CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim)
POSITIONS = np.tile(np.arange(LENGTH), (3, 1))


class Items(list[Tensor]):
    """Calibration inputs in memory, split as the driver splits them."""

    held_out: frozenset[int] = frozenset()


class Parts:
    """A decoder layer as `published_awq` wants one: its attention and its MLP by themselves."""

    def __init__(self, runner: LayerRunner) -> None:
        self.capture = runner.capture
        with torch.device("meta"):
            self._layer = DecoderLayer(CONFIG, dense, "layer", 0).requires_grad_(False)
        self._rope = mrope(
            torch.from_numpy(POSITIONS)[:, None],
            CONFIG.mrope_section,
            CONFIG.head_dim,
            CONFIG.rope_theta,
        )

    def attention(self, weights: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, None]:
        cache = KVCache(1, 1, GEOMETRY.kv_heads, len(x), GEOMETRY.head_dim, x.dtype, x.device)
        held = _inside(weights, "self_attn.")
        call = (x[None], self._rope, cache, 0, 0)
        return functional_call(self._layer.self_attn, held, call)[0], None

    def mlp(self, weights: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, None]:
        return functional_call(self._layer.mlp, _inside(weights, "mlp."), (x,)), None


def _inside(weights: Mapping[str, Tensor], prefix: str) -> Weights:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


@dataclass(frozen=True)
class Bench:
    """The trained model, what it is calibrated with and what it is judged by."""

    model: Trained
    calibration: Tensor
    judged: Tensor
    group_size: int
    seed: int

    def runner(self) -> LayerRunner:
        return LayerRunner(CONFIG, [POSITIONS] * max(len(self.calibration), len(self.judged)))

    def embedded(self, ids: Tensor) -> Items:
        table = self.model.weights["model.embed_tokens.weight"].float()
        items = Items(F.embedding(each[:-1], table) for each in ids)
        items.held_out = held_out(len(items), self.seed)
        return items

    def exact(self, index: int) -> Weights:
        return {name: tensor.float() for name, tensor in self.model.layer(index).items()}

    def stack(self, method: str) -> list[Weights]:
        """Every layer's weights as a reader of the method's file computes with them."""
        runner, items = self.runner(), self.embedded(self.calibration)
        layers = []
        for index in range(CONFIG.num_hidden_layers):
            found = self._layer(method, index, runner, items)
            layers.append(found)
            onward = self.exact(index) if method == "autoawq" else found
            items[:] = [runner.forward(onward, i, x) for i, x in enumerate(items)]
        return layers

    def _layer(self, method: Any, index: int, runner: LayerRunner, items: Items) -> Weights:
        if method == "16-bit":
            return self.exact(index)
        if method == "autoawq":
            return published_awq(Parts(runner), self.exact(index), items, self.group_size)
        settings = SearchSettings(group_size=self.group_size, method=method, seed=self.seed)
        layer = (self.model.layer(index), runner.forward, runner.capture, items)
        return dense_layer(quantize_layer(*layer, GEOMETRY, settings).tensors, self.group_size)

    def errors(self, stacks: Mapping[str, Sequence[Weights]]) -> dict[str, list[float]]:
        """Layer errors of each method, with the inputs that the 16-bit model gives."""
        runner, items = self.runner(), self.embedded(self.judged)
        found: dict[str, list[float]] = {name: [] for name in stacks}
        for index in range(CONFIG.num_hidden_layers):
            true = [runner.forward(self.exact(index), i, x) for i, x in enumerate(items)]
            energy = sum(float((y - x).square().sum()) for x, y in zip(items, true, strict=True))
            for name, layers in stacks.items():
                change = sum(
                    float((runner.forward(layers[index], i, x) - y).square().sum())
                    for i, (x, y) in enumerate(zip(items, true, strict=True))
                )
                found[name].append(change / energy)
            items[:] = true
        return found

    def perplexity(self, layers: Sequence[Weights]) -> float:
        runner, weights = self.runner(), self.model.weights
        norm, head = weights["model.norm.weight"].float(), weights["lm_head.weight"].float()
        total = 0.0
        for i, (x, ids) in enumerate(zip(self.embedded(self.judged), self.judged, strict=True)):
            for layer in layers:
                x = runner.forward(layer, i, x)
            scores = F.rms_norm(x, norm.shape, norm, CONFIG.rms_norm_eps) @ head.T
            total += float(F.cross_entropy(scores, ids[1:]))
        return float(np.exp(total / len(self.judged)))


METHODS = {
    "16-bit": "16-bit",
    "rtn": "rounded to the nearest (`--method rtn`)",
    "autoawq": "AutoAWQ's algorithm",
    "awq": "`--method awq`",
    "awq+gptq": "`--method awq+gptq`",
}


def measure(bench: Bench, note: Callable[[str], None]) -> dict[str, Any]:
    """One row for each method: layer errors, their mean, that of their ratios to AutoAWQ's."""
    stacks, seconds = {}, {}
    for method in METHODS:
        begun = time.process_time()
        stacks[method] = bench.stack(method)
        seconds[method] = time.process_time() - begun
        note(f"{method}: {seconds[method]:.1f} s of the processor")
    errors = bench.errors(stacks)
    rows = {}
    for method, layers in errors.items():
        ratios = [one / base for one, base in zip(layers, errors["autoawq"], strict=True)]
        rows[method] = {
            "layer_errors": layers,
            "mean_error": float(np.mean(layers)),
            "ratios": ratios,
            "mean_ratio": float(np.mean(ratios)),
            "mean_ratio_of_roots": float(np.mean(np.sqrt(ratios))),
            "perplexity": bench.perplexity(stacks[method]),
            "cpu_seconds": seconds[method],
        }
    return rows


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| | layer output error | of AutoAWQ's algorithm's | by layer | perplexity |",
        "|---|---|---|---|---|",
    ]
    for method, row in rows.items():
        by_layer = ", ".join(f"{ratio:.2f}" for ratio in row["ratios"])
        errors = f"{row['mean_error']:.5f} | {row['mean_ratio']:.3f} | {by_layer}"
        errors = "0 | | " if method == "16-bit" else errors
        lines.append(f"| {METHODS[method]} | {errors} | {row['perplexity']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="keeps the trained model")
    parser.add_argument("--steps", type=int, default=1600, help="of training (default: 1600)")
    parser.add_argument("--group-size", type=int, default=128, choices=(32, 64, 128))
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--judged", type=int, default=1000, help="held-out sequences at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    given = parser.parse_args()
    model = trained(given.folder, given.steps, given.seed)
    torch.manual_seed(given.seed)
    chosen = torch.randperm(len(model.seen))[: given.samples]
    bench = Bench(
        model, model.seen[chosen], model.unseen[: given.judged], given.group_size, given.seed
    )
    with torch.inference_mode():
        rows = measure(bench, lambda said: print(said, file=sys.stderr))
    print(table(rows))
    if given.json is not None:
        told = {
            "training": {"steps": given.steps, "loss": model.loss},
            "config": vars(CONFIG),
            "group_size": given.group_size,
            "calibration_tokens": bench.calibration[:, 1:].numel(),
            "held_out_tokens": bench.judged[:, 1:].numel(),
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "torch": torch.__version__,
            "methods": rows,
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
