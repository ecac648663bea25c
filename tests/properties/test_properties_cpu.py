"""Random models, budgets and requests computed on the CPU: the plan holds, and no budget changes
the reply."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from properties.random_shapes import Shapes
from properties.written_models import Talk, small_models, talks, write

from lowvram import LowVRAMOmni, Result

CASES = 10
"""Models and requests; with each a budget that is refused, the least, and two above it."""


@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=CASES,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(small_models(), talks(), st.floats(0, 1))
def test_plans_hold(shapes: Shapes, asked: Talk, share: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(write(shapes, Path(folder) / "model"), asked, share)


def check(folder: Path, asked: Talk, share: float) -> None:
    conversation, options = asked.messages, asked.options
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as omni:
        least = omni.plan(conversation, **options).minimum_budget_bytes
    with LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory=least * 99 // 100) as omni:
        refused = omni.plan(conversation, **options)
        assert not refused.fits and refused.minimum_budget_bytes == least
    replies = []
    for budget in (least, int(least * (1 + share)), 4 * least):
        with LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory=budget) as omni:
            replies.append(omni.generate(conversation, **options))
        report = replies[-1].report
        assert report.predicted_peak_bytes <= omni.plan(conversation, **options).budget_bytes
        for row in report.phases:
            assert row.measured_peak_bytes <= row.predicted_peak_bytes, row
    assert all(same(reply, replies[0]) for reply in replies)


def same(one: Result, other: Result) -> bool:
    return (
        one.tokens == other.tokens
        and one.codes == other.codes
        and np.array_equal(one.audio, other.audio)  # type: ignore[arg-type]
    )
