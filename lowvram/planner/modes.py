"""Plans for comparison: the smallest budget at which the Thinker runs in a given way. No torch."""

from __future__ import annotations

from typing import Literal

from lowvram.conversation import PromptShape
from lowvram.offload import Budget, guard_bytes
from lowvram.planner.choices import Choices
from lowvram.planner.device import ASSUMED_CONTEXT_BYTES, DeviceFacts, DtypeChoice, resolve_dtype
from lowvram.planner.gains import minimum_budget
from lowvram.planner.model import ModelFacts
from lowvram.planner.options import ANY, Limits
from lowvram.planner.plan import Plan
from lowvram.planner.planner import make_plan
from lowvram.planner.question import Question
from lowvram.settings import GenerationSettings

Mode = Literal["resident", "kv-host", "minimum"]

_LIMITS: dict[Mode, Limits] = {
    "resident": Limits(streams=False, kv="device"),
    "kv-host": Limits(streams=False, kv="host"),
    "minimum": ANY,
}

META = DeviceFacts(
    name="meta",
    type="meta",
    total_bytes=None,
    free_bytes=None,
    context_bytes=ASSUMED_CONTEXT_BYTES,
    assumed=True,
)
"""Shapes alone, with what a driver would take."""


def plan_mode(
    model: ModelFacts,
    shape: PromptShape,
    settings: GenerationSettings,
    *,
    mode: Mode,
    facts: DeviceFacts = META,
    dtype: DtypeChoice | None = None,
) -> Plan:
    """The plan within the smallest budget that does.

    `resident`: every layer of the Thinker stays while it is used, and so do its keys and values;
    `kv-host`: those wait on the host; `minimum`: anything goes. Other parts get what is left.
    """
    limits = _LIMITS[mode]
    chosen = dtype or resolve_dtype("auto", model.stored_dtype, facts, packed=bool(model.packed))
    question = Question(
        model=model,
        shape=shape,
        settings=settings.completed(model.generation),
        facts=facts,
        dtype=chosen,
    )
    smallest = Choices(question.request(), facts, "pinned").smallest(limits)
    budget = minimum_budget(smallest)
    return make_plan(
        model,
        shape,
        settings,
        facts=facts,
        budget=Budget(
            budget_bytes=budget,
            context_bytes=facts.context_bytes,
            guard_bytes=guard_bytes(budget),
        ),
        dtype=chosen,
        limits=limits,
    )
