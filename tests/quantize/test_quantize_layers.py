"""One layer by itself, activations that wait on disk, and the comparison of two heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lowvram.checkpoint import resolve
from lowvram.models.kv_cache import KVCache
from lowvram.models.linear import dense
from lowvram.models.text import Decoder
from lowvram.offload import open_device
from lowvram.quant import dequantize, quantize_layer
from lowvram.quantize import QuantizeSettings, prepare_job
from lowvram.quantize.activations import Activations
from lowvram.quantize.layer import LayerRunner, dense_weights, packed_layer, read_layer
from lowvram.quantize.verify import compare, compare_heads


def test_layers_one_by_one_are_the_decoder(source: Path, tmp_path: Path) -> None:
    job = prepare_job(source, tmp_path / "x", QuantizeSettings(calibration="none"))
    checkpoint = job.source.checkpoint
    config = checkpoint.config.thinker.text
    x = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = np.stack([np.arange(9), np.arange(9) // 2, np.arange(9) % 3])
    runner = LayerRunner(config, [positions])
    with checkpoint.store:
        layers = [read_layer(job.source, layer) for layer in range(2)]
    decoder = Decoder(config, dense, "thinker.model").eval()
    for module, weights in zip(decoder.layers, layers, strict=True):
        module.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    cache = KVCache(
        layers=2,
        batch=1,
        kv_heads=config.num_key_value_heads,
        max_tokens=9,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with torch.inference_mode():
        rope = decoder.rope(torch.from_numpy(positions)[:, None], torch.float32)
        wanted = decoder(x[None], rope, cache, 0)[0]
        found = x
        for weights in layers:
            found = runner.forward(weights, 0, found)
    assert torch.allclose(decoder.norm(found), wanted, atol=1e-6)
    short = runner.forward(layers[0], 0, x[:4])
    assert torch.allclose(short, runner.forward(layers[0], 0, x)[:4], atol=1e-6)


def test_the_inputs_of_every_linear_are_seen(source: Path, tmp_path: Path) -> None:
    job = prepare_job(source, tmp_path / "x", QuantizeSettings(calibration="none"))
    config = job.source.checkpoint.config.thinker.text
    with job.source.checkpoint.store:
        weights = {name: w.float() for name, w in read_layer(job.source, 0).items()}
    x = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(0))
    runner = LayerRunner(config, [np.tile(np.arange(5), (3, 1))])
    seen = runner.capture(weights, 0, x)
    normed = F.rms_norm(x, x.shape[-1:], weights["input_layernorm.weight"], config.rms_norm_eps)
    assert torch.allclose(seen["self_attn.q_proj"], normed, atol=1e-5)
    gate, up = (seen[f"mlp.{n}_proj"] @ weights[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    assert torch.allclose(seen["mlp.down_proj"], F.silu(gate) * up, atol=1e-5)
    attended = x + seen["self_attn.o_proj"] @ weights["self_attn.o_proj.weight"].T
    out = attended + seen["mlp.down_proj"] @ weights["mlp.down_proj.weight"].T
    assert torch.allclose(runner.forward(weights, 0, x), out, atol=1e-5)
    assert len(seen) == 7
    weights["self_attn.o_proj.weight"] = torch.full((3, 3), torch.nan)  # not even looked at
    early = runner.capture(weights, 0, x, "self_attn.o_proj")
    assert list(early) == [f"self_attn.{name}_proj" for name in "qkvo"]
    assert all(torch.equal(tensor, seen[name]) for name, tensor in early.items())
    with pytest.raises(RuntimeError, match="shape"):
        runner.capture(weights, 0, x, "mlp.gate_proj")


def test_each_layer_is_fed_by_the_quantized_one_before(
    source: Path, quantize: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fed: list[torch.Tensor] = []
    runners: list[Any] = []

    def note(weights: Any, forward: Any, capture: Any, inputs: Any, *rest: Any) -> Any:
        fed.append(inputs[0].clone())
        runners.append(forward)
        return quantize_layer(weights, forward, capture, inputs, *rest)

    monkeypatch.setattr("lowvram.quantize.layers.quantize_layer", note)
    quantize(source, tmp_path / "result", method="rtn")
    with resolve(tmp_path / "result").store as store:
        packed = packed_layer(store, "thinker.model.layers.0.")
    wanted = runners[0](dense_weights(packed, 128, torch.bfloat16), 0, fed[0])
    assert torch.equal(fed[1], wanted)


def test_a_packed_layer_is_unpacked_by_the_formula(whole: Path) -> None:
    prefix = "thinker.model.layers.1."
    with resolve(whole).store as store:
        packed = packed_layer(store, prefix)
    found = dense_weights(packed, 128, torch.float32)
    assert {n.rpartition(".")[2] for n in found} == {"weight", "bias"}
    for linear in ("self_attn.k_proj", "mlp.down_proj"):
        stored = [packed[f"{linear}.{kind}"].numpy() for kind in ("qweight", "qzeros", "scales")]
        wanted = torch.from_numpy(dequantize(*stored, 128).T)
        assert torch.equal(found[f"{linear}.weight"], wanted)
    assert torch.equal(
        found["self_attn.q_proj.bias"], packed["self_attn.q_proj.bias"].to(torch.float32)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_kept_while_they_fit_and_spilled_beyond(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tokens, width = [3, 5, 2], 4
    budget = 5 * width * dtype.itemsize
    held = Activations(
        tokens,
        width,
        dtype,
        budget=budget,
        folder=tmp_path / "spill",
        device=torch.device("cpu"),
    )
    values = [torch.randn(n, width).to(dtype) for n in tokens]
    for index, value in enumerate(values):
        held[index] = value
    assert held.spilled == {1}
    assert held.kept_bytes == budget
    assert len(list((tmp_path / "spill").iterdir())) == 1
    assert all(torch.equal(a, b) for a, b in zip(held, values, strict=True))
    held[1] = values[1] * 2
    assert torch.equal(held[1], values[1] * 2)
    with pytest.raises(IndexError):
        held[3]
    held.close()
    assert not (tmp_path / "spill").exists()


class Table:
    """A head of given logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def logits(self, start: int, stop: int) -> torch.Tensor:
        return self._logits[:, start:stop]


def test_heads_are_compared_in_pieces_as_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, 20_000, generator=generator).mul(8).double()
    same, divergence = compare_heads(Table(a), Table(b), 20_000)  # type: ignore[arg-type]
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    assert torch.equal(same, a.argmax(-1) == b.argmax(-1))
    assert torch.allclose(divergence, (p.exp() * (p - q)).sum(-1))
    same, divergence = compare_heads(Table(a), Table(a), 20_000)  # type: ignore[arg-type]
    assert same.all() and divergence.max() < 1e-9


def test_verification_tells_near_from_far(source: Path, whole: Path, tmp_path: Path) -> None:
    settings = QuantizeSettings(device="cpu", samples=2, seq_len=48)
    job = prepare_job(source, tmp_path / "x", settings)
    with job.source.checkpoint.store:
        near = compare(replace(job, destination=whole), open_device("cpu"), print)
    assert near["tokens"] > 10
    assert near["agreement"] > 0.5 and 0 < near["kl"] < 0.5
    assert 0 < near["layers"][0] < near["layers"][1] < 0.3
    assert {row["layer"] for row in near["worst"]} == {0, 1}
    assert list(tmp_path.iterdir()) == []
