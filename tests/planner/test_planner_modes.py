"""Plans against the engine: requests run on `meta` as planned, at true and at small shapes."""

from __future__ import annotations

from typing import Any

import pytest

from lowvram.bench.memory import run_plan
from lowvram.bench.memory_request import video_prompt
from lowvram.config import OmniConfig
from lowvram.planner import config_facts, plan_mode
from lowvram.pocket import pocket_config
from lowvram.settings import GenerationSettings
from lowvram.specs import SPECS

CASES = {
    "7B-AWQ": (SPECS["Qwen2.5-Omni-7B-AWQ"].config, 4),
    "pocket": (OmniConfig.from_dict(pocket_config()), 2),
}


@pytest.mark.parametrize("mode", ["resident", "kv-host", "minimum"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_predicted_is_measured(name: str, mode: Any) -> None:
    config, seconds = CASES[name]
    model = config_facts(name, config)
    prompt = video_prompt(config.thinker, seconds)
    settings = GenerationSettings(max_new_tokens=40, max_speech_seconds=2.0)
    plan = plan_mode(model, prompt.shape, settings, mode=mode)
    assert plan.fits and plan.budget_bytes == plan.minimum_budget_bytes
    streams = bool(plan.placements.get("text"))
    homes = {"resident": (False, "device"), "kv-host": (False, "host")}
    assert homes.get(mode, (streams, plan.kv["thinker"])) == (streams, plan.kv["thinker"])
    for phase in run_plan(model, prompt, settings.completed(model.generation), plan):
        predicted = plan.phase(phase.name).predicted_peak_bytes - plan.context_bytes
        assert phase.peak_bytes <= predicted <= 1.1 * phase.peak_bytes
