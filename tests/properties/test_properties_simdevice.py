"""Random models, budgets and requests on the simulated accelerator: the reply of an unlimited
device within the driver's limit, without a race, or a refusal that says exactly what would do."""

from __future__ import annotations

from pathlib import Path

import pytest
import simdevice as sim
import torch
from properties.drawing import Agreement, check_refusal, on_small_models
from properties.written_models import Talk
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
    agreement, streamed = Agreement(), []
    on_small_models(CASES, lambda *case: streamed.append(check(*case, agreement)))
    agreement.check()
    assert any(streamed), "nothing was ever streamed"


def prepare(limit: int) -> None:
    sim.reset()
    sim.configure(limit=limit, context=FALLBACK_CONTEXT_BYTES)


def check(folder: Path, asked: Talk, share: float, agreement: Agreement) -> int:
    """Returns the bytes that were streamed."""
    prepare(8 * GIB)
    with LowVRAMOmni.from_pretrained(folder, device="npu") as omni:
        roomy = omni.plan(asked.messages, **asked.options)
        wanted = omni.generate(asked.messages, **asked.options)
    least = roomy.minimum_budget_bytes
    streamed = 0
    check_refusal(folder, "npu", asked, least)
    for budget in (least, least + int(share**2 * LEEWAY)):
        prepare(budget)
        with LowVRAMOmni.from_pretrained(folder, device="npu", max_memory=budget) as omni:
            plan = omni.plan(asked.messages, **asked.options)
            reply = omni.generate(asked.messages, **asked.options)
            streamed += omni._loader.bytes_streamed
        agreement.add(reply, plan, wanted, roomy)
        check_report(reply)
        assert torch.npu.max_memory_reserved() + FALLBACK_CONTEXT_BYTES <= budget
        assert sim.refusals() == 0 and sim.races() == []
        assert sim.live_bytes() == sim.pinned_bytes() == 0
    return streamed


def check_report(reply: Result) -> None:
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
