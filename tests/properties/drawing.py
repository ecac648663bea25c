"""How random cases are drawn, the same ones in every run, and what holds for all of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from properties.random_shapes import Shapes
from properties.written_models import Talk, small_models, talks, write
from replies import same_reply

from lowvram import LowVRAMOmni, Result
from lowvram.planner import Plan

drawn = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
"""For cases that cost next to nothing."""

costly = settings(drawn, phases=[Phase.explicit, Phase.generate])
"""A case that fails is not made smaller, for each one runs a model."""


def on_small_models(cases: int, check: Callable[[Path, Talk, float], None]) -> None:
    """Runs the check on so many models, each with a request and a share in [0, 1]."""

    @settings(costly, max_examples=cases)
    @given(small_models(), talks(), st.floats(0, 1))
    def run(shapes: Shapes, asked: Talk, share: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            check(write(shapes, Path(folder) / "model"), asked, share)

    run()


def check_refusal(folder: Path, device: str, asked: Talk, least: int) -> None:
    """One per cent below the least budget the plan says exactly what would do."""
    with LowVRAMOmni.from_pretrained(folder, device=device, max_memory=least * 99 // 100) as omni:
        refused = omni.plan(asked.messages, **asked.options)
    assert not refused.fits and refused.minimum_budget_bytes == least


@dataclass
class Agreement:
    """Replies to the same requests within different budgets.

    They are the same, unless the prompt went through in other chunks: that is the last resort, and
    rounds differently, which may change a code here and there.
    """

    same: int = 0
    rounded: int = 0

    def add(self, reply: Result, plan: Plan, wanted: Result, roomy: Plan) -> None:
        if same_reply(reply, wanted):
            self.same += 1
        else:
            assert plan.chunks != roomy.chunks
            self.rounded += 1

    def check(self) -> None:
        assert self.same > 4 * self.rounded
