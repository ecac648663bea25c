"""The planner: every plan keeps its budget, and a bigger budget is never used worse."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.conversation import PromptShape
from lowvram.errors import DeviceError, UsageError
from lowvram.offload import Budget, guard_bytes
from lowvram.planner import (
    DeviceFacts,
    DtypeChoice,
    ModelFacts,
    Plan,
    config_facts,
    decide_budget,
    make_plan,
    resolve_dtype,
)
from lowvram.settings import GenerationSettings
from lowvram.specs import SPECS

GIB = 2**30
SEVEN = config_facts("7B", SPECS["Qwen2.5-Omni-7B-AWQ"].config)
THREE = config_facts("3B", SPECS["Qwen2.5-Omni-3B-AWQ"].config)
MODULES = ("visual", "audio", "text", "talker", "token2wav")

VIDEO = PromptShape(tokens=11_715, next_position=500, grids=((15, 36, 64),), audio_frames=(1500,))
WORDS = PromptShape(tokens=60, next_position=60, grids=(), audio_frames=())


def facts(kind: str = "cuda", **changes: Any) -> DeviceFacts:
    known: dict[str, Any] = {
        "name": kind,
        "type": kind,
        "total_bytes": 24 * GIB,
        "free_bytes": 23 * GIB,
        "context_bytes": int(0.4 * GIB) if kind == "cuda" else 0,
    }
    return DeviceFacts(**known | changes)


def plan(
    budget: int,
    shape: PromptShape = VIDEO,
    kind: str = "cuda",
    on_device: frozenset[str] = frozenset(),
    model: ModelFacts = SEVEN,
    host_free: int = 16 * GIB,
    **request: Any,
) -> Plan:
    where = facts(kind)
    return make_plan(
        model,
        shape,
        GenerationSettings(**request),
        facts=where,
        budget=Budget(
            budget_bytes=budget,
            context_bytes=where.context_bytes,
            guard_bytes=guard_bytes(budget),
        ),
        dtype=DtypeChoice("float16", "as stored"),
        on_device=on_device,
        host_free=host_free,
    )


budgets = st.integers(2 * GIB, 20 * GIB)
shapes = st.sampled_from([VIDEO, WORDS])
few = settings(max_examples=30, deadline=None)


@few
@given(budgets, shapes, st.booleans(), st.sampled_from(["cuda", "cpu", "npu"]))
def test_a_plan_keeps_the_budget_or_says_what_would_do(
    budget: int, shape: PromptShape, speech: bool, kind: str
) -> None:
    found = plan(budget, shape, kind, speech=speech)
    assert found.predicted_peak_bytes == max(row.predicted_peak_bytes for row in found.phases)
    for row in found.phases:
        assert row.predicted_peak_bytes == found.context_bytes + sum(row.parts.values())
        assert set(row.modules) <= set(row.on_device)
    assert found.fits == (found.predicted_peak_bytes + found.guard_bytes <= budget)
    assert found.fits == (budget >= found.minimum_budget_bytes)
    assert plan(found.minimum_budget_bytes, shape, kind, speech=speech).fits
    assert not plan(found.minimum_budget_bytes - 1, shape, kind, speech=speech).fits


@few
@given(budgets, budgets, shapes)
def test_a_bigger_budget_is_never_used_worse(one: int, other: int, shape: PromptShape) -> None:
    small, big = sorted((one, other))
    slow, fast = plan(small, shape, speech=False), plan(big, shape, speech=False)
    if slow.fits:
        assert fast.fits
        after = frozenset(MODULES)  # times of a second request, for which the choice is made
        slow, fast = (plan(b, shape, on_device=after, speech=False) for b in (small, big))
        assert seconds(fast) <= seconds(slow) * (1 + 1e-9)


def seconds(found: Plan) -> float:
    return sum(row.seconds for row in found.phases)


def test_with_room_for_everything_all_stays_and_speech_begins_while_the_thinker_writes() -> None:
    found = plan(23 * GIB)
    assert all(found.resident(m) for m in MODULES)
    assert [row.name for row in found.phases] == [
        "vision",
        "audio",
        "prefill",
        "decode+talk+vocode",
    ]


def test_with_little_room_modules_come_and_go_and_speech_is_staged() -> None:
    found = plan(plan(GIB, model=THREE).minimum_budget_bytes, model=THREE)
    assert found.residency["text"].startswith("streamed: ")
    assert found.residency["visual"] == "on demand"
    assert [row.name for row in found.phases][-2:] == ["talk", "vocode"]
    assert found.phase("vision").on_device == ("visual",)


def test_a_second_request_moves_only_what_did_not_stay() -> None:
    first = plan(23 * GIB)
    again = plan(23 * GIB, on_device=frozenset(MODULES))
    sizes = [SEVEN.part_sizes(m, 2, aligned=True) for m in MODULES]
    assert first.bytes_to_move == sum(one.total + one.passing for one in sizes)
    # What passes is read again, where no earlier request has left what is made of it.
    assert again.bytes_to_move == sum(one.passing for one in sizes)


def test_what_a_request_does_not_use_stays_only_where_it_fits() -> None:
    left = frozenset({"visual", "audio", "text"})
    assert plan(23 * GIB, WORDS, on_device=left, speech=False).resident("visual")
    tight = plan(plan(GIB, WORDS, speech=False).minimum_budget_bytes, WORDS, on_device=left)
    assert tight.residency["visual"] == "unused"


def test_without_speech_nothing_of_speech_is_planned() -> None:
    found = plan(8 * GIB, speech=False)
    assert found.residency["talker"] == found.residency["token2wav"] == "unused"
    assert {row.name for row in found.phases} == {"vision", "audio", "prefill", "decode"}


def test_a_refusal_names_changes_that_need_less() -> None:
    refused = plan(3 * GIB // 2, WORDS, max_new_tokens=20_000, max_speech_seconds=400.0)
    assert not refused.fits
    assert refused.knobs
    assert all(size < refused.minimum_budget_bytes for size in refused.knobs.values())


def test_positions_beyond_the_window_are_refused_with_the_numbers() -> None:
    long = PromptShape(tokens=40_000, next_position=32_000, grids=(), audio_frames=())
    with pytest.raises(UsageError, match="32768"):
        plan(23 * GIB, long, max_new_tokens=1024)
    assert plan(23 * GIB, long, max_new_tokens=700, speech=False).fits


def test_speech_beyond_the_talkers_window_is_refused_with_what_would_do() -> None:
    most = (32_768 - WORDS.next_position - 2) / 50
    assert plan(8 * GIB, WORDS, max_speech_seconds=most).fits
    with pytest.raises(UsageError, match=rf"use at most {most:g} s"):
        plan(8 * GIB, WORDS, max_speech_seconds=most + 0.02)
    assert plan(8 * GIB, WORDS, speech=False, max_speech_seconds=1000.0).fits


def test_the_budget_is_what_is_free_unless_less_is_asked_for() -> None:
    assert decide_budget(None, facts()).budget_bytes == 23 * GIB
    assert decide_budget("8GiB", facts()).budget_bytes == 8 * GIB


def test_more_than_is_free_is_lowered_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="lowered to"):
        assert decide_budget("23.5GiB", facts()).budget_bytes == 23 * GIB


def test_more_than_the_device_has_is_refused() -> None:
    with pytest.raises(UsageError, match="more than cuda has"):
        decide_budget("25GiB", facts())


def test_an_absent_device_needs_a_number() -> None:
    absent = facts(total_bytes=None, free_bytes=None)
    assert decide_budget("80GiB", absent).budget_bytes == 80 * GIB
    with pytest.raises(DeviceError, match="max-memory"):
        decide_budget(None, absent)


def test_types() -> None:
    assert resolve_dtype("auto", "float16", facts()).name == "float16"
    assert resolve_dtype("auto", "float16", facts("cpu")).name == "bfloat16"
    assert resolve_dtype("auto", "bfloat16", facts(bfloat16=False)).name == "float16"
    assert resolve_dtype("float32", "bfloat16", facts("cpu")) == ("float32", "asked for")
    with pytest.raises(UsageError, match="float64"):
        resolve_dtype("float64", "bfloat16", facts("cpu"))
