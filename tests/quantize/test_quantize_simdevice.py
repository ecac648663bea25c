"""A checkpoint quantized on a simulated NPU: nothing of what it lacks is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import simdevice as sim
from simdevice import simulated

from lowvram.quantize import QuantizeReport


def test_every_step_has_its_place(
    source: Path, quantize: Callable[..., QuantizeReport], tmp_path: Path
) -> None:
    """That without float64 and without factors of matrices is the host."""

    @simulated
    def inside() -> None:
        sim.reset()
        sim.configure(limit=1 << 30, context=0)
        options = {"method": "awq+gptq", "samples": 2, "seq_len": 64}
        report = quantize(source, tmp_path / "result", device="npu", **options)
        for layer in report.layers:
            assert layer["error_after"] < 0.5 * layer["error_before"]
            kept = [step["group"] for step in layer["steps"] if step["tried"] == "compensation"]
            assert kept == ["qkv", "o", "gate-up", "down"]
        assert sim.live_bytes() == 0 and sim.races() == []

    inside()
