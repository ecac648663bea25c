"""The timeline: the most of each stretch of time, bounded, with nothing high left out."""

from __future__ import annotations

import random

from lowvram.offload.timeline import STEP_S, TIMELINE_POINTS, Held, Timeline

WEIGHTS = ("weights", "text")
SHORT = STEP_S / 8


def note(timeline: Timeline, seconds: float, phase: str, held: Held, live: int = 0) -> None:
    timeline.note(seconds, phase, held, sum(held.values()), live)


def totals(timeline: Timeline) -> list[int]:
    return [sum(point.bytes_by_owner.values()) for point in timeline.points()]


def test_a_stretch_has_its_highest_level_then_its_last() -> None:
    timeline = Timeline()
    for i, live in enumerate((1, 9, 4)):
        note(timeline, i * SHORT, "vision", {WEIGHTS: 100}, live)
    first, second = timeline.points()
    assert (first.seconds, first.bytes_by_owner) == (0, {"weights": 100, "activations": 9})
    assert (second.seconds, second.bytes_by_owner["activations"]) == (2 * SHORT, 4)
    assert second.bytes_by_key == {"weights": {"text": 100}}


def test_phases_are_told_apart_however_short() -> None:
    timeline = Timeline()
    for i, phase in enumerate(("vision", "audio", "prefill")):
        note(timeline, i * 1e-9, phase, {})
    assert [p.phase for p in timeline.points()] == ["vision", "audio", "prefill"]
    assert timeline.phase == "prefill"


def test_the_context_is_there_all_the_time_and_a_device_s_own_peak_is_lifted_in() -> None:
    timeline = Timeline(context=50)
    note(timeline, 0, "", {})
    note(timeline, 1, "prefill", {WEIGHTS: 100})
    timeline.lift(30)
    timeline.lift(20)
    assert totals(timeline) == [50, 180]


def test_a_long_timeline_keeps_its_highest_level_phases_and_end() -> None:
    chance = random.Random(0)
    timeline = Timeline()
    top = 0
    for i in range(20 * TIMELINE_POINTS):
        live = chance.randrange(10**6)
        top = max(top, live)
        note(timeline, i * 10 * STEP_S, "decode" if i > 100 else "prefill", {WEIGHTS: 7}, live)
    points = timeline.points()
    assert TIMELINE_POINTS // 8 < len(points) <= TIMELINE_POINTS
    assert max(p.bytes_by_owner["activations"] for p in points) == top
    assert points[-1].bytes_by_owner["activations"] == live
    assert [p.phase for p in points] == sorted((p.phase for p in points), reverse=True)
    assert points[0].phase == "prefill" and points[0].seconds == 0
    assert [p.seconds for p in points] == sorted(p.seconds for p in points)


def test_phases_that_alternate_are_bounded_too() -> None:
    timeline = Timeline()
    for i in range(3 * TIMELINE_POINTS):
        note(timeline, i, "talk" if i % 2 else "vocode", {WEIGHTS: i})
    assert len(timeline.points()) <= TIMELINE_POINTS
    assert totals(timeline)[-1] == 3 * TIMELINE_POINTS - 1
