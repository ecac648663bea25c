"""What a listener would hear, against hand-computed cases and a second simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.engine.pieces import VocodeSettings
from lowvram.errors import UsageError
from lowvram.report import (
    ORDERS,
    Heard,
    Order,
    StepTimes,
    best_blocks,
    enough_codes_per_s,
    listen,
    longest_gap,
)

SMALL = VocodeSettings(blocks=(1,), vocoder_left_frames=0, vocoder_right_frames=0)
TIMES = StepTimes(think_s=0.1, talk_s=0.01, mel_s=0.001, wave_s=0.002)
NO_TIME = StepTimes(talk_s=0.0, mel_s=0.0)


@pytest.mark.parametrize(
    ("order", "tokens", "arrivals", "total"),
    [
        # 24 codes, the text beside them; then 48 frames of mel and 24 of sound. 12 codes more, the
        # same again; then what is left, 24 and 24 frames.
        ("staged", 31, (3.336, 3.552, 3.624), 3.624),
        ("interleaved", 31, (2.736, 3.552, 3.624), 3.624),
        ("apart", 31, (3.456, 3.552, 3.624), 3.624),
        # The first code needs a state, even of a reply that ends at once.
        ("staged", 1, (0.436, 0.652, 0.724), 0.724),
        ("interleaved", 1, (0.436, 0.652, 0.724), 0.724),
        # Text that speech does not wait for comes last.
        ("interleaved", 51, (2.736, 4.152, 4.224), 5.624),
        ("staged", 51, (5.336, 5.552, 5.624), 5.624),
    ],
)
def test_each_step_waits_for_those_before(
    order: Order, tokens: int, arrivals: tuple[float, ...], total: float
) -> None:
    heard = listen(TIMES, SMALL, codes=36, tokens=tokens, order=order)
    assert heard.arrivals == pytest.approx(arrivals)
    assert heard.lengths == pytest.approx((0.24, 0.24, 0.24))
    assert heard.total_s == pytest.approx(total)
    assert heard.first_sound_s == heard.arrivals[0]


def test_a_pass_takes_its_own_time_besides_its_frames() -> None:
    heard = listen(replace(TIMES, pass_s=1.0), SMALL, codes=36)
    assert heard.arrivals == pytest.approx((2.436, 4.652, 6.724))
    assert heard.longest_gap_s == pytest.approx(2.216 - 0.24)
    assert heard.smooth_from_s == pytest.approx(6.724 - 0.48)


@pytest.mark.parametrize("order", ORDERS)
def test_without_codes_there_is_nothing(order: Order) -> None:
    heard = listen(TIMES, codes=0, tokens=3, order=order)
    assert heard == Heard((), (), pytest.approx(0.2))
    assert (heard.first_sound_s, heard.longest_gap_s, heard.smooth_from_s) == (None, 0.0, None)


def test_how_fast_codes_must_come() -> None:
    """Passes in no time. One block a piece: 12 codes have to come within 0.24 s."""
    assert enough_codes_per_s(NO_TIME, SMALL, codes=360) == pytest.approx(50, rel=5e-3)
    # By default there are 0.28 s after 36 codes, and 1.72 s when the piece of eight blocks has its
    # 204: 168 codes later.
    default = enough_codes_per_s(NO_TIME, codes=600)
    assert default == pytest.approx(168 / 1.72, rel=2e-3)
    assert enough_codes_per_s(replace(NO_TIME, talk_s=9.0), codes=600) == default
    # Where the text is written in between, there is less time for codes.
    thinking = replace(NO_TIME, think_s=0.01)
    need = enough_codes_per_s(thinking, codes=600, tokens=101)
    assert need is not None and default is not None and need > 1.3 * default
    assert enough_codes_per_s(thinking, codes=600, tokens=101, order="staged") == default


def test_any_speed_or_none_is_enough() -> None:
    assert enough_codes_per_s(TIMES, codes=600, order="apart") == 0
    assert enough_codes_per_s(NO_TIME, codes=36) == 0  # all of it comes at once
    slow = replace(TIMES, mel_s=0.02)  # twice as slow as speech
    assert enough_codes_per_s(slow, codes=600) is None


def test_the_speed_found_is_enough_and_hardly_less_is_not() -> None:
    times = replace(TIMES, wave_s=0.0005)
    need = enough_codes_per_s(times, codes=600, order="staged")
    assert need is not None
    at, below = (
        listen(replace(times, talk_s=1 / rate), codes=600, order="staged")
        for rate in (need, 0.995 * need)
    )
    assert at.longest_gap_s <= 1.01e-3 < below.longest_gap_s


def test_the_best_list_has_no_gap_then_sounds_early_then_is_done_early() -> None:
    lists = [(8,), (2,), (1,), (2, 4)]
    quick = replace(NO_TIME, talk_s=1 / 90)  # one block a piece: 4 frames, then 12 codes
    assert best_blocks(quick, lists, codes=480) == (2,)
    assert best_blocks(replace(quick, mel_s=0.003), lists, codes=480) == (8,)
    assert best_blocks(replace(quick, talk_s=1e-4), lists, codes=480) == (1,)
    equal = [(2, 4), (2, 8)]
    assert best_blocks(replace(quick, talk_s=0.0, mel_s=1e-4), equal, codes=480) == (2, 8)


TOLD = {
    "phase_seconds": {"decode": 3.0, "talk": 4.0, "vocode": 2.0, "prefill": 1.0},
    "codes": 200,
    "reply_tokens": 30,
}


def test_step_times_of_a_report() -> None:
    """All passes together take what the report says, whatever the settings."""
    for chosen in (VocodeSettings(), SMALL, VocodeSettings(look_ahead=3)):
        times = StepTimes.of_report(TOLD, chosen)
        assert (times.think_s, times.talk_s) == (0.1, 0.02)
        assert times.wave_s == pytest.approx(0.032 * times.mel_s)
        heard = listen(replace(times, think_s=0.0), chosen, codes=200)
        assert heard.total_s == pytest.approx(6.0)


@pytest.mark.parametrize(
    "change",
    [
        {"codes": 0},
        {"phase_seconds": {}},
        {"phase_seconds": {"talk": 1.0}},
        {"phase_seconds": {"vocode": 1.0}},
    ],
)
def test_a_report_without_speech_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="request that spoke"):
        StepTimes.of_report(TOLD | change)


@pytest.mark.parametrize("bad", [-0.1, float("inf"), float("nan")])
def test_times_are_finite_and_not_negative(bad: float) -> None:
    with pytest.raises(UsageError, match="step times"):
        replace(TIMES, wave_s=bad)


seconds = st.floats(0, 0.05)
some_times = st.builds(
    StepTimes,
    think_s=seconds,
    talk_s=seconds,
    mel_s=st.floats(0, 0.01),
    wave_s=st.floats(0, 0.005),
    pass_s=seconds,
)
some_settings = st.builds(
    VocodeSettings,
    blocks=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    look_ahead=st.integers(0, 3),
    vocoder_left_frames=st.integers(0, 34),
    vocoder_right_frames=st.integers(0, 34),
)
replies = st.fixed_dictionaries({"codes": st.integers(1, 250), "tokens": st.integers(1, 60)})


@settings(max_examples=60, deadline=None)
@given(some_times, some_settings, replies, st.sampled_from(ORDERS), st.data())
def test_faster_never_waits_longer(
    times: StepTimes, chosen: VocodeSettings, reply: Any, order: Order, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["think_s", "talk_s", "mel_s", "wave_s", "pass_s"]))
    faster = replace(times, **{name: getattr(times, name) * data.draw(st.floats(0, 1))})
    before = listen(times, chosen, order=order, **reply)
    after = listen(faster, chosen, order=order, **reply)
    assert after.longest_gap_s <= before.longest_gap_s + 1e-9
    assert after.lengths == before.lengths
    pairs = zip(after.arrivals, before.arrivals, strict=True)
    assert all(soon <= late + 1e-9 for soon, late in pairs)


@settings(max_examples=60, deadline=None)
@given(some_times, some_settings, replies)
def test_every_order_gives_the_same_pieces(
    times: StepTimes, chosen: VocodeSettings, reply: Any
) -> None:
    heard = [listen(times, chosen, order=order, **reply) for order in ORDERS]
    assert heard[0].lengths == heard[1].lengths == heard[2].lengths
    assert sum(heard[0].lengths) == pytest.approx(reply["codes"] / 50)
    assert [one.total_s for one in heard] == pytest.approx([heard[0].total_s] * 3)
    firsts = [one.first_sound_s for one in heard]
    assert firsts[0] is not None and firsts[1] is not None and firsts[2] is not None
    assert firsts[0] <= firsts[1] + 1e-9 <= firsts[2] + 2e-9
    assert heard[2].longest_gap_s <= heard[1].longest_gap_s + 1e-9


def silences(arrivals: Sequence[float], lengths: Sequence[float]) -> list[float]:
    """Each by its definition: a piece starts when all before it, and it itself, can have ended."""
    found = []
    for i in range(1, len(arrivals)):
        ends = [arrivals[j] + sum(lengths[j:i]) for j in range(i)]
        found.append(max(0.0, arrivals[i] - max(ends)))
    return found


@settings(max_examples=60, deadline=None)
@given(some_times, some_settings, replies, st.sampled_from(ORDERS))
def test_the_longest_gap_is_that_of_the_report(
    times: StepTimes, chosen: VocodeSettings, reply: Any, order: Order
) -> None:
    heard = listen(times, chosen, order=order, **reply)
    assert heard.longest_gap_s == longest_gap(heard.arrivals, heard.lengths)
    wanted = max([0.0, *silences(heard.arrivals, heard.lengths)])
    assert heard.longest_gap_s == pytest.approx(wanted, abs=1e-9)
    start = heard.smooth_from_s
    assert start is not None and start >= heard.arrivals[0]


@settings(max_examples=60, deadline=None)
@given(some_times, some_settings, replies, st.sampled_from(ORDERS))
def test_pressing_play_late_enough_is_enough(
    times: StepTimes, chosen: VocodeSettings, reply: Any, order: Order
) -> None:
    heard = listen(times, chosen, order=order, **reply)
    start = heard.smooth_from_s
    assert start is not None
    assert pressed(heard, start) <= 1e-9
    assert start < heard.arrivals[0] + 1e-6 or pressed(heard, start - 1e-3) > 1e-9


def pressed(heard: Heard, start: float) -> float:
    """The longest silence of a listener who presses play then, or with the first chunk."""
    late = [max(start, arrived) for arrived in heard.arrivals]
    return max([0.0, *silences(late, heard.lengths)])
