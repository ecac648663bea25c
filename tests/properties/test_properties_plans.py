"""Random models, budgets and requests: a larger budget is never used worse, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from properties.drawing import drawn
from properties.random_shapes import Asked, Known, Model, models, requests

from lowvram.offload import Budget, guard_bytes
from lowvram.planner import DeviceFacts, Plan, make_plan, resolve_dtype
from lowvram.specs import SPECS

MIB = 1 << 20

ROUNDING = 2e-6
"""Seconds below which plans count as equally fast."""

shares = st.lists(st.floats(0, 1), min_size=4, max_size=4)
unsaid = requests(codes=60)
"""Speech shorter than a piece; else a plan may end later to be heard sooner."""


def planned(
    model: Model,
    asked: Asked,
    kind: str,
    host_free: int,
    budget: int,
    on_device: frozenset[str] = frozenset(),
) -> Plan:
    context = 0 if kind in ("cpu", "meta") else 400 * MIB
    facts = DeviceFacts(
        name=kind, type=kind, total_bytes=None, free_bytes=None, context_bytes=context
    )
    return make_plan(
        model.facts,
        asked.prompt(model.facts).shape,
        asked.settings,
        facts=facts,
        budget=Budget(budget_bytes=budget, context_bytes=context, guard_bytes=guard_bytes(budget)),
        dtype=resolve_dtype(
            "auto", model.facts.stored_dtype, facts, packed=bool(model.facts.packed)
        ),
        host_free=host_free,
        on_device=on_device,
    )


def again(model: Model, asked: Asked, kind: str, host_free: int, budget: int) -> Plan:
    """The plan for a second such request, which finds what the first one left."""
    first = planned(model, asked, kind, host_free, budget)
    left = frozenset(part for part in first.residency if first.resident(part))
    second = planned(model, asked, kind, host_free, budget, left)
    assert (second.residency, second.placements) == (first.residency, first.placements)
    return second


def check(model: Model, asked: Asked, kind: str, host_free: int, above: Sequence[float]) -> None:
    least = planned(model, asked, kind, host_free, 1).minimum_budget_bytes
    assert not planned(model, asked, kind, host_free, least - 1).fits
    before: Plan | None = None
    for share in (0.0, *sorted(above), 1.0):
        plan = again(model, asked, kind, host_free, int(least * (1 + 6 * share**3)))
        assert plan.fits
        if any(placement.source == "pinned" for placement in plan.placements.values()):
            assert plan.host_bytes < host_free
        if before is not None:
            check_no_worse(before, plan)
        before = plan


def check_no_worse(small: Plan, large: Plan) -> None:
    """Chunks are as large, and if they are the same it is as fast: larger ones go before speed."""
    assert min(small.chunks.values()) <= min(large.chunks.values())
    if small.chunks == large.chunks:
        assert seconds(large) <= seconds(small) + ROUNDING


def seconds(plan: Plan) -> float:
    return sum(row.seconds for row in plan.phases)


@pytest.mark.parametrize("kind", ["cuda", "npu", "cpu", "meta"])
def test_more_budget_is_never_slower_nor_refused(kind: str) -> None:
    @settings(drawn, max_examples=40)
    @given(
        st.booleans().flatmap(lambda packed: models(packed, 8)),
        unsaid,
        st.sampled_from([1 << 30, 64 << 30]),
        shares,
    )
    def sweeps(model: Model, asked: Asked, host_free: int, above: list[float]) -> None:
        check(model, asked, kind, host_free, above)

    sweeps()


@pytest.mark.parametrize("kind", ["cuda", "npu", "cpu"])
@pytest.mark.parametrize("name", SPECS)
def test_true_shapes_use_every_budget(name: str, kind: str) -> None:
    asked = Asked(media=((15, 27, 28, 1500), 40), tokens=200, codes=60)
    check(Known(name), asked, kind, 64 << 30, [step / 10 for step in range(1, 10)])
