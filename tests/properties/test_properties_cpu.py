"""Random models, budgets and requests computed on the CPU: the plan holds, and no budget changes
the reply."""

from __future__ import annotations

from pathlib import Path

from properties.drawing import Agreement, check_refusal, on_small_models
from properties.written_models import Talk

from lowvram import LowVRAMOmni

CASES = 10
"""Models and requests; with each a budget that is refused, the least, one above it, and all."""


def test_plans_hold() -> None:
    agreement = Agreement()
    on_small_models(CASES, lambda *case: check(*case, agreement))
    agreement.check()


def check(folder: Path, asked: Talk, share: float, agreement: Agreement) -> None:
    conversation, options = asked.messages, asked.options
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as omni:
        roomy = omni.plan(conversation, **options)
        wanted = omni.generate(conversation, **options)
    least = roomy.minimum_budget_bytes
    check_refusal(folder, "cpu", asked, least)
    for budget in (least, int(least * (1 + share))):
        with LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory=budget) as omni:
            plan = omni.plan(conversation, **options)
            reply = omni.generate(conversation, **options)
        assert reply.report.predicted_peak_bytes <= plan.budget_bytes
        for row in reply.report.phases:
            assert row.measured_peak_bytes <= row.predicted_peak_bytes, row
        agreement.add(reply, plan, wanted, roomy)
