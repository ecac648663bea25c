"""The decoder layers one after the other, each fed by the quantized ones before it."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lowvram.errors import CheckpointError
from lowvram.offload import Device, Store
from lowvram.quant import Geometry, LayerResult, SearchSettings, quantize_layer
from lowvram.quantize.front import Calibration, Front
from lowvram.quantize.job import Job
from lowvram.quantize.layer import LayerRunner, dense_weights, packed_layer, read_layer
from lowvram.quantize.progress import Note, OnProgress, Progress
from lowvram.quantize.shards import Entry
from lowvram.quantize.work import Workplace

_WORDS = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int32: "I32",
}
"""Types a finished layer may hold -> the words of safetensors."""

CALIBRATION = "calibration.json"


class LayerWork:
    """Quantizes what is not yet finished in `place`."""

    def __init__(
        self, job: Job, place: Workplace, device: Device, on_progress: OnProgress, note: Note
    ) -> None:
        self._job, self._place, self._device = job, place, device
        self._on_progress, self._note = on_progress, note
        self._dtype = compute_dtype(job, device)
        self._seconds: list[float] = []

    def run(self) -> None:
        """Afterwards every layer is finished.

        What the finished layers of an interrupted run give is worked out again, in the same way
        and so to the same bits.
        """
        finished, layers = len(self._place.finished()), self._job.source.layers
        if finished == layers:
            return
        calibration = self._calibrate()
        try:
            for layer in range(layers):
                if layer >= finished:
                    self._quantize(layer, calibration)
                if layer + 1 < layers and calibration is not None:
                    self._advance(layer, calibration)
                gc.collect()
        finally:
            if calibration is not None:
                calibration.inputs.close()

    def _calibrate(self) -> Calibration | None:
        job = self._job
        if not len(job.found):
            self._place.save(CALIBRATION, {"conversations": 0})
            return None
        self._on_progress(Progress("calibrate", 0, job.source.layers))
        checkpoint, seq_len = job.source.checkpoint, job.settings.seq_len
        front = Front(checkpoint, self._device, self._dtype, seq_len, self._note)
        try:
            found = front.run(
                job.found,
                job.settings,
                budget=job.plan.activations,
                folder=self._place.spill,
            )
        finally:
            front.close()
        self._place.save(CALIBRATION, found.to_json())
        return found

    def _quantize(self, layer: int, calibration: Calibration | None) -> None:
        job, settings = self._job, self._job.settings
        text = job.source.checkpoint.config.thinker.text
        weights = read_layer(job.source, layer)
        norm = weights["input_layernorm.weight"].dtype
        runner = None if calibration is None else LayerRunner(text, calibration.positions)
        result = quantize_layer(
            {name: tensor.to(self._device.torch) for name, tensor in weights.items()},
            None if runner is None else runner.forward,
            None if runner is None else runner.capture,
            None if calibration is None else calibration.inputs,
            Geometry(text.num_attention_heads, text.num_key_value_heads, text.head_dim),
            SearchSettings(
                bits=settings.bits,
                group_size=settings.group_size,
                method=settings.method,
                seed=settings.seed,
                dtype=norm,
            ),
        )
        self._seconds.append(result.seconds)
        prefix = job.source.layer_prefix(layer)
        self._place.add_layer(layer, _entries(prefix, result.tensors), _record(result))
        left = job.source.layers - layer - 1
        self._on_progress(
            Progress(
                "layer",
                layer + 1,
                job.source.layers,
                result.error_before,
                result.error_after,
                left * sum(self._seconds) / len(self._seconds),
            )
        )

    def _advance(self, layer: int, calibration: Calibration) -> None:
        """Replace every input of this layer by what the quantized layer makes of it."""
        source = self._job.source
        prefix = source.layer_prefix(layer)
        with Store(self._place.folder, [self._place.layer_file(layer)]) as store:
            packed = packed_layer(store, prefix)
        weights = dense_weights(packed, self._job.settings.group_size, self._dtype)
        weights = {name: tensor.to(self._device.torch) for name, tensor in weights.items()}
        runner = LayerRunner(source.checkpoint.config.thinker.text, calibration.positions)
        for index, x in enumerate(calibration.inputs):
            out = runner.forward(weights, index, x)
            if not bool(torch.isfinite(out).all()):
                raise CheckpointError(
                    f"decoder layer {layer} gives NaN or infinity in {self._dtype}; the weights "
                    "are beyond that type's range: wanted another checkpoint"
                )
            calibration.inputs[index] = out


def compute_dtype(job: Job, device: Device) -> torch.dtype:
    """bfloat16 where the weights are that and the device computes in it, else float32."""
    stored = job.source.checkpoint.stored_dtype
    return torch.bfloat16 if stored == "bfloat16" and device.has_bfloat16() else torch.float32


def _entries(prefix: str, tensors: Mapping[str, Tensor]) -> list[Entry]:
    return [_entry(prefix + name, tensors[name]) for name in sorted(tensors)]


def _entry(name: str, tensor: Tensor) -> Entry:
    flat = tensor.detach().cpu().contiguous().view(-1)
    data = flat.view(torch.uint8).numpy().data
    return Entry(name, _WORDS[tensor.dtype], tuple(tensor.shape), data.nbytes, lambda: [data])


def _record(result: LayerResult) -> dict[str, Any]:
    """What is kept about a layer; `sha256` and the layer's number come with the file."""
    return {
        "error_before": result.error_before,
        "error_after": result.error_after,
        "linears": [asdict(report) | {"ratio": report.ratio} for report in result.reports],
        "steps": [asdict(step) for step in result.steps],
        "seconds": result.seconds,
    }
