"""Random models, budgets and requests on the simulated accelerator: the reply of an unlimited
device within the driver's limit, without a race, or a refusal that says exactly what would do."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import simdevice as sim
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from properties.random_shapes import Shapes
from properties.written_models import Talk, small_models, talks, write
from simdevice import simulated

from lowvram import LowVRAMOmni, Result
from lowvram.offload.accelerator import FALLBACK_CONTEXT_BYTES

GIB = 1 << 30

CASES = 11
"""Models and requests; with each three triples: a budget that is refused, the least, and one a
little above it, where plans differ most."""

LEEWAY = 16 << 20
"""Above the least budget in which everything between streaming all and keeping all lies."""


@simulated
def test_budgets_are_kept_and_change_no_reply() -> None:
    tried: list[int] = []

    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=CASES,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(small_models(), talks(), st.floats(0, 1))
    def triples(shapes: Shapes, asked: Talk, share: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            tried.append(check(write(shapes, Path(folder) / "model"), asked, share))

    triples()
    assert any(tried), "nothing was ever streamed"


def prepare(limit: int) -> None:
    sim.reset()
    sim.configure(limit=limit, context=FALLBACK_CONTEXT_BYTES)


def check(folder: Path, asked: Talk, share: float) -> int:
    """Returns the bytes that were streamed."""
    prepare(8 * GIB)
    with LowVRAMOmni.from_pretrained(folder, device="npu") as omni:
        wanted = omni.generate(asked.messages, **asked.options)
        least = omni.plan(asked.messages, **asked.options).minimum_budget_bytes
    streamed = 0
    with LowVRAMOmni.from_pretrained(folder, device="npu", max_memory=least * 99 // 100) as omni:
        refused = omni.plan(asked.messages, **asked.options)
        assert not refused.fits and refused.minimum_budget_bytes == least
    for budget in (least, least + int(share**2 * LEEWAY)):
        prepare(budget)
        with LowVRAMOmni.from_pretrained(folder, device="npu", max_memory=budget) as omni:
            reply = omni.generate(asked.messages, **asked.options)
            streamed += omni._loader.bytes_streamed
            check_reply(reply, wanted)
        assert torch.npu.max_memory_reserved() + FALLBACK_CONTEXT_BYTES <= budget
        assert sim.refusals() == 0 and sim.races() == []
        assert sim.live_bytes() == sim.pinned_bytes() == 0
    return streamed


def check_reply(reply: Result, wanted: Result) -> None:
    assert (reply.tokens, reply.codes) == (wanted.tokens, wanted.codes)
    assert np.array_equal(reply.audio, wanted.audio)  # type: ignore[arg-type]
    assert reply.report.notes == ()
    for row in reply.report.phases:
        assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes


@simulated
def test_what_a_plan_did_not_see_is_held_by_the_allocator() -> None:
    """The device has more, but not for this process."""
    prepare(8 * GIB)
    with LowVRAMOmni.from_pretrained("pocket", device="npu", max_memory=2 * GIB):
        kept = torch.empty(GIB, dtype=torch.uint8, device="npu")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * GIB - FALLBACK_CONTEXT_BYTES - GIB + 1, dtype=torch.uint8, device="npu")
        del kept
