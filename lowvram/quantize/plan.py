"""What quantizing would do, need and take, from headers alone. Imports no torch, writes nothing."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowvram.errors import DoesNotFitError, LowVRAMError
from lowvram.offload import format_size
from lowvram.planner import probe_device
from lowvram.quantize.calibration import CalibrationSet
from lowvram.quantize.settings import QuantizeSettings
from lowvram.quantize.source import Source
from lowvram.tensors import PARTS, expected_tensors, part_bytes, part_of

INTERPRETER_BYTES = 300 << 20
"""Python, torch and the tokenizer, measured on Linux x86-64 with a CPU build of torch."""

WORKING_COPIES = 11
"""The largest linear in float32, so many times: what the search takes beside the layer. Measured
at the 7B's shapes, where the process's peak was 3.66 GiB with 6,200 tokens of calibration."""

# Rates of one core, measured on two cores at the 7B's layer (AVX-512, bfloat16).
_FLOPS = 250e9
_SECONDS_PER_VALUE = {"awq": 350e-9, "awq+gptq": 890e-9, "rtn": 50e-9}
_DISK_BYTES_PER_SECOND = 400e6


@dataclass(frozen=True)
class QuantizePlan:
    """Sizes in bytes, times in seconds (a guess from the size of the model and the cores).

    `kept` maps each part that is copied to its bytes. `memory` is the most host memory that will
    be held; `activations` of it, the rest of them on disk (`spilled`).
    """

    source: str
    destination: str
    method: str
    group_size: int
    layers: int
    linears: int
    source_bytes: int
    quantized_from: int
    quantized_to: int
    kept: dict[str, int]
    result_bytes: int
    samples: int
    tokens: int
    memory: int
    activations: int
    spilled: int
    disk: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        kept = ", ".join(f"{part} {format_size(size)}" for part, size in self.kept.items() if size)
        spilled = f" ({format_size(self.spilled)} of them on disk)" if self.spilled else ""
        lines = [
            f"{self.source} -> {self.destination}",
            f"quantized: {self.linears} linears in {self.layers} decoder layers, {self.method}, "
            f"4 bits in groups of {self.group_size}: {format_size(self.quantized_from)} -> "
            f"{format_size(self.quantized_to)}",
            f"copied as it is: {kept}",
            f"result: {format_size(self.result_bytes)} of {format_size(self.source_bytes)}",
            f"calibration: at most {self.samples} conversations, {self.tokens} tokens{spilled}"
            if self.samples
            else "calibration: none",
            f"memory: {format_size(self.memory)}",
            f"disk: {format_size(self.disk)} while it works",
            f"time: about {_duration(self.seconds)}",
        ]
        return "\n".join(lines)


def plan_quantization(
    source: Source, destination: Path, settings: QuantizeSettings, found: CalibrationSet
) -> QuantizePlan:
    """What `quantize_checkpoint` with the same arguments would do.

    Raises:
        DoesNotFitError: `max_memory` is below what one layer and the towers take.
    """
    config = source.checkpoint.config
    layers = range(source.layers)
    stored = [sum(info.nbytes for info in source.layer_tensors(layer)) for layer in layers]
    packed = [source.packed_bytes(layer) for layer in layers]
    kept: dict[str, int] = dict.fromkeys(PARTS, 0)
    for info in source.other_tensors():
        kept[part_of(info.name)] += info.nbytes
    side = sum(path.stat().st_size for path in source.side_files())
    samples = min(settings.samples, len(found))
    tokens = samples * settings.seq_len
    itemsize = {"bfloat16": 2}.get(source.checkpoint.stored_dtype, 4)
    activations = tokens * config.thinker.text.hidden_size * itemsize
    need = _working_bytes(source, max(stored), settings, samples, itemsize)
    budget = activation_budget(settings, need)
    in_memory = min(activations, budget)
    values = sum(math.prod(info.shape) for layer in layers for info in source.layer_tensors(layer))
    result = sum(packed) + sum(kept.values()) + side
    return QuantizePlan(
        source=source.checkpoint.name,
        destination=str(destination),
        method=settings.method,
        group_size=settings.group_size,
        layers=source.layers,
        linears=len(source.linears),
        source_bytes=sum(stored) + sum(kept.values()) + side,
        quantized_from=sum(stored),
        quantized_to=sum(packed),
        kept=kept,
        result_bytes=result,
        samples=samples,
        tokens=tokens,
        memory=need + in_memory,
        activations=in_memory,
        spilled=activations - in_memory,
        disk=result + sum(packed) + activations - in_memory,
        seconds=_seconds(values, tokens, settings.method, result + sum(stored)),
    )


def activation_budget(settings: QuantizeSettings, need: int) -> int:
    """Bytes that activations may hold in memory, beside `need` for everything else.

    Raises:
        DoesNotFitError: there is less than `need`.
    """
    most = settings.max_memory
    if most is None:
        free = probe_device("cpu").free_bytes
        return max(0, (free or need) // 2 - need)
    if most < need:
        raise DoesNotFitError(
            f"--max-memory {format_size(most)} is too little for one decoder layer and its search; "
            f"wanted at least {format_size(need, round_up=True)}"
        )
    return most - need


def check_disk(plan: QuantizePlan, folder: Path, held: int) -> None:
    """Refuse to begin where the disk cannot hold the work; `held` bytes of it are there already.

    Raises:
        LowVRAMError: too little is free.
    """
    free = shutil.disk_usage(folder).free
    if free + held < plan.disk:
        raise LowVRAMError(
            f"{folder} has {format_size(free)} free; wanted {format_size(plan.disk - held)} for "
            "the result and what is made on the way: free some, or choose another place"
        )


def _working_bytes(
    source: Source, layer: int, settings: QuantizeSettings, samples: int, itemsize: int
) -> int:
    """Host memory of everything but the waiting activations, at the larger of two moments."""
    text = source.checkpoint.config.thinker.text
    largest = max(inputs * outputs for inputs, outputs, _ in source.linears.values())
    # One conversation on its way through: the wide ones are the MLP's.
    passing = settings.seq_len * (3 * text.intermediate_size + 8 * text.hidden_size) * 4
    search = layer + WORKING_COPIES * 4 * largest + passing
    if not samples:
        return INTERPRETER_BYTES + search
    tensors = expected_tensors(source.checkpoint.config)
    held = part_bytes(tensors, lambda name: itemsize)
    towers = max(held["visual"], held["audio"])
    return INTERPRETER_BYTES + max(search, towers + 4 * passing)


def _seconds(values: int, tokens: int, method: str, moved: int) -> float:
    cores = os.cpu_count() or 1
    running = 2 * 2 * values * tokens / _FLOPS  # once to look at the inputs, once to go on
    searching = values * _SECONDS_PER_VALUE[method]
    return (running + searching) / cores + moved / _DISK_BYTES_PER_SECOND


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
