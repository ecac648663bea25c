"""Random packed models on the simulated NPU with its 4-bit product: every budget gives the reply of
an unlimited device, sound included, within what was planned."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import simdevice as sim
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from properties.random_shapes import Shapes
from properties.written_models import Talk, small_models, talks, write
from simdevice import operator, simulated

from lowvram import LowVRAMOmni
from lowvram.offload.accelerator import FALLBACK_CONTEXT_BYTES

GIB = 1 << 30
CASES = 6
LEEWAY = 16 << 20
"""Above the least budget in which everything between streaming all and keeping all lies."""


@simulated
def test_budgets_are_kept_and_change_no_reply() -> None:
    streamed: list[int] = []

    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=CASES,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(small_models().filter(lambda shapes: bool(shapes.group)), talks(), st.floats(0, 1))
    def cases(shapes: Shapes, asked: Talk, share: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            streamed.append(check(write(shapes, Path(folder) / "model"), asked, share))

    with operator.defined():
        cases()
    assert any(streamed), "nothing was ever streamed"


def prepare(limit: int) -> None:
    sim.reset()
    sim.configure(limit=limit, context=FALLBACK_CONTEXT_BYTES)


def check(folder: Path, asked: Talk, share: float) -> int:
    """Returns the bytes that were streamed."""
    prepare(8 * GIB)
    with LowVRAMOmni.from_pretrained(folder, device="npu") as omni:
        least = omni.plan(asked.messages, **asked.options).minimum_budget_bytes
        wanted = omni.generate(asked.messages, **asked.options)
    streamed = 0
    for budget in (least, least + int(share**2 * LEEWAY)):
        prepare(budget)
        operator.calls.clear()
        with LowVRAMOmni.from_pretrained(folder, device="npu", max_memory=budget) as omni:
            reply = omni.generate(asked.messages, **asked.options)
            streamed += omni._loader.bytes_streamed
        assert operator.calls
        assert (reply.tokens, reply.codes) == (wanted.tokens, wanted.codes)
        assert np.array_equal(reply.audio, wanted.audio)  # type: ignore[arg-type]
        for row in reply.report.phases:
            assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes
        assert torch.npu.max_memory_reserved() + FALLBACK_CONTEXT_BYTES <= budget
        assert sim.refusals() == 0 and sim.races() == []
        assert sim.live_bytes() == sim.pinned_bytes() == 0
    return streamed
