"""From a request and a budget to a plan. Imports no torch."""

from lowvram.planner.allowed import OPTIONS, check_options, options_of, vocoder_dtype
from lowvram.planner.device import (
    DeviceFacts,
    DtypeChoice,
    decide_budget,
    probe_device,
    resolve_dtype,
)
from lowvram.planner.model import ModelFacts, config_facts, model_facts
from lowvram.planner.modes import plan_mode
from lowvram.planner.plan import PhasePlan, Plan
from lowvram.planner.planner import make_plan, plan_request
from lowvram.planner.streaming import spread

__all__ = [
    "OPTIONS",
    "DeviceFacts",
    "DtypeChoice",
    "ModelFacts",
    "PhasePlan",
    "Plan",
    "check_options",
    "config_facts",
    "decide_budget",
    "make_plan",
    "model_facts",
    "options_of",
    "plan_mode",
    "plan_request",
    "probe_device",
    "resolve_dtype",
    "spread",
    "vocoder_dtype",
]
