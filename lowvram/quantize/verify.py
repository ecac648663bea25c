"""Both checkpoints on the same held-out conversations: hidden states after each layer, and the
distribution of the next token. One layer, or one piece of the head, is in memory at a time.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram.checkpoint import Checkpoint, resolve
from lowvram.errors import CheckpointError
from lowvram.offload import Device, Store
from lowvram.quantize.activations import Activations
from lowvram.quantize.calibration import builtin_set
from lowvram.quantize.front import Calibration, Front
from lowvram.quantize.job import Job
from lowvram.quantize.layer import LayerRunner, dense_weights, packed_layer, read_layer
from lowvram.quantize.layers import compute_dtype
from lowvram.quantize.progress import Note

_HEAD = "thinker.lm_head.weight"
_NORM = "thinker.model.norm.weight"
_ROWS = 8192
"""Rows of the head that are multiplied at a time."""

_WORST = 3


def compare(job: Job, device: Device, note: Note) -> dict[str, Any]:
    """How far the result is from its source.

    Conversations are those of the calibration set that were held out; where there is no set, two of
    the built-in kind.

    Returns:
        `agreement` (share of tokens whose likeliest successor is the same), `kl` (mean divergence
        of the next token, in nats), `tokens`, `layers` (relative error of the hidden states after
        each) and `worst` (the layers that add the most to it).

    Raises:
        CheckpointError: the result gives NaN.
    """
    dtype = compute_dtype(job, device)
    found = job.found if len(job.found) else builtin_set(2, job.settings.seed, first=0)
    made = resolve(job.destination)
    with (
        made.store,
        tempfile.TemporaryDirectory(prefix=f"{job.destination.name}.") as folder,
    ):
        front = Front(job.source.checkpoint, device, dtype, job.settings.seq_len, note)
        try:
            calibration = front.run(
                found, job.settings, budget=job.plan.activations // 3, folder=Path(folder) / "all"
            )
        finally:
            front.close()
        pair = _Pair(job, made, device, calibration, Path(folder))
        errors = [pair.advance(layer) for layer in range(job.source.layers)]
        agreement, divergence, tokens = pair.heads()
    steps = [after - before for before, after in zip([0.0, *errors], errors, strict=False)]
    worst = sorted(range(len(steps)), key=lambda layer: -steps[layer])[:_WORST]
    return {
        "agreement": agreement,
        "kl": divergence,
        "tokens": tokens,
        "layers": errors,
        "worst": [{"layer": layer, "error": steps[layer]} for layer in worst],
    }


class _Pair:
    """The two models' hidden states on their way through the layers."""

    def __init__(
        self, job: Job, made: Checkpoint, device: Device, calibration: Calibration, folder: Path
    ) -> None:
        self._job, self._made, self._device = job, made, device
        inputs = calibration.inputs
        chosen = sorted(inputs.held_out) or list(range(len(inputs)))
        positions = [calibration.positions[index] for index in chosen]
        self._runner = LayerRunner(job.source.checkpoint.config.thinker.text, positions)
        self._states = tuple(
            Activations(
                [inputs.tokens[index] for index in chosen],
                inputs.width,
                inputs.dtype,
                budget=job.plan.activations // 3,
                folder=folder / side,
                device=device.torch,
            )
            for side in ("source", "made")
        )
        for states in self._states:
            for place, index in enumerate(chosen):
                states[place] = inputs[index]
        inputs.close()

    def advance(self, layer: int) -> float:
        """Run one layer of both; the relative error of the states after it."""
        job, (true, near) = self._job, self._states
        self._run(true, read_layer(job.source, layer))
        packed = packed_layer(self._made.store, job.source.layer_prefix(layer))
        self._run(near, dense_weights(packed, job.settings.group_size, true.dtype))
        wrong = sum(float((b.float() - a.float()).square().sum()) for a, b in self._both())
        energy = sum(float(a.float().square().sum()) for a in true)
        if not energy or wrong != wrong:
            raise CheckpointError(
                f"after decoder layer {layer} the states of {job.destination} are no numbers; "
                "wanted finite ones: quantize again with another group size"
            )
        return (wrong / energy) ** 0.5

    def _both(self) -> zip[tuple[Tensor, Tensor]]:
        return zip(*self._states, strict=True)

    def _run(self, states: Activations, weights: dict[str, Tensor]) -> None:
        held = {n: w.to(self._device.torch, states.dtype) for n, w in weights.items()}
        weights.clear()
        for index, x in enumerate(states):
            states[index] = self._runner.forward(held, index, x)
        gc.collect()

    def heads(self) -> tuple[float, float, int]:
        """(agreement, mean divergence, tokens) of the next-token distributions."""
        source = self._job.source.checkpoint
        same, divergence, tokens = 0, 0.0, 0
        for true, near in self._both():
            found = compare_heads(
                _Head(source, true), _Head(self._made, near), source.config.thinker.text.vocab_size
            )
            same, divergence = same + int(found[0].sum()), divergence + float(found[1].sum())
            tokens += len(true)
        return same / tokens, divergence / tokens, tokens


class _Head:
    """Logits of final states, some of the vocabulary at a time."""

    def __init__(self, checkpoint: Checkpoint, states: Tensor) -> None:
        self._store: Store = checkpoint.store
        norm = self._store.read(_NORM).to(states.device).float()
        eps = checkpoint.config.thinker.text.rms_norm_eps
        self._states = F.rms_norm(states.float(), norm.shape, norm, eps)

    def logits(self, start: int, stop: int) -> Tensor:
        rows = self._store.rows(_HEAD, range(start, stop))
        return self._states @ rows.to(self._states.device).float().T


def compare_heads(true: _Head, near: _Head, vocabulary: int) -> tuple[Tensor, Tensor]:
    """(whether the likeliest token is the same, KL(true || near)), each [T], in one pass over the
    vocabulary: sums of exponentials are kept relative to the largest logit so far."""
    tops: list[tuple[Tensor, Tensor]] = []
    sums: tuple[Tensor, Tensor, Tensor] | None = None
    high: tuple[Tensor, Tensor] | None = None
    for start in range(0, vocabulary, _ROWS):
        a, b = (head.logits(start, min(vocabulary, start + _ROWS)) for head in (true, near))
        (a_top, a_at), (b_top, b_at) = a.max(-1), b.max(-1)
        if high is None or sums is None:
            high, tops = (a_top, b_top), [(a_at, b_at)]
            sums = _sums(a, b, *high)
            continue
        now = torch.maximum(high[0], a_top), torch.maximum(high[1], b_top)
        shrink = (high[0] - now[0]).exp(), (high[1] - now[1]).exp()
        fresh = _sums(a, b, *now)
        sums = (
            sums[0] * shrink[0] + fresh[0],
            sums[1] * shrink[1] + fresh[1],
            sums[2] * shrink[0] + fresh[2],
        )
        last = tops[-1]
        tops.append(
            (
                torch.where(a_top > high[0], a_at + start, last[0]),
                torch.where(b_top > high[1], b_at + start, last[1]),
            )
        )
        high = now
    assert high is not None and sums is not None, "a vocabulary has tokens"
    divergence = sums[2] / sums[0] - (high[0] + sums[0].log()) + (high[1] + sums[1].log())
    return tops[-1][0] == tops[-1][1], divergence.clamp(min=0)


def _sums(a: Tensor, b: Tensor, a_high: Tensor, b_high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the piece: e^a, e^b, and e^a (a - b)."""
    weights = (a - a_high[:, None]).exp()
    return weights.sum(-1), (b - b_high[:, None]).exp().sum(-1), (weights * (a - b)).sum(-1)
