"""Readers that are slow, stop, leave early or raise, at random events: nothing stays on the device,
and the next request is as if there had been none before."""

from __future__ import annotations

import random
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from replies import held, open_model, same_reply

from lowvram import Finished, LowVRAMOmni, Result
from lowvram.pocket import make_checkpoint

ASKED: list[dict[str, Any]] = [{"role": "user", "content": "Well?"}]
SHORT: dict[str, Any] = {"max_new_tokens": 5, "max_speech_seconds": 0.8}
LEAVING = ("close", "forget", "raise", "interrupt", "raise in the loop")


class Bored(Exception):
    """What a reader raises."""


@pytest.fixture(scope="module", params=["resident", "streamed"])
def omni(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LowVRAMOmni]:
    folder = make_checkpoint(tmp_path_factory.mktemp("models") / "pocket", seed=5)
    with open_model(folder, ASKED, SHORT, tight=request.param == "streamed") as opened:
        yield opened


@pytest.fixture(scope="module")
def wanted(omni: LowVRAMOmni) -> Result:
    return omni.generate(ASKED, **SHORT)


def books(omni: LowVRAMOmni) -> tuple[Any, ...]:
    return omni.resident, held(omni)


def leave(omni: LowVRAMOmni, way: str, after: int) -> None:
    """Read so many events, then go."""
    stream = omni.stream(ASKED, **SHORT)
    for _ in range(after):
        next(stream)
    match way:
        case "close":
            stream.close()
        case "forget":
            del stream
        case "raise":
            with pytest.raises(Bored):
                stream.throw(Bored())
        case "interrupt":
            with pytest.raises(KeyboardInterrupt):
                stream.throw(KeyboardInterrupt())
        case _:
            with pytest.raises(Bored):
                _raise_in_loop(stream)


def _raise_in_loop(stream: Generator[Any, None, None]) -> None:
    for _ in stream:
        raise Bored


@pytest.mark.parametrize("way", LEAVING)
def test_a_reader_that_leaves_at_any_event_leaves_nothing(
    way: str, omni: LowVRAMOmni, wanted: Result
) -> None:
    omni._loader.close()
    last = len(wanted.tokens) + 1  # the first sound comes after every word, or earlier
    leave(omni, way, random.Random(way).randint(1, last))
    assert books(omni) == ((), {})
    assert same_reply(omni.generate(ASKED, **SHORT), wanted)


def test_what_stayed_before_stays_when_a_reader_leaves(omni: LowVRAMOmni, wanted: Result) -> None:
    assert same_reply(omni.generate(ASKED, **SHORT), wanted)
    before = books(omni)
    leave(omni, "close", 1)
    assert books(omni) == before
    leave(omni, "raise", len(wanted.tokens) + 1)
    assert books(omni) == before
    assert same_reply(omni.generate(ASKED, **SHORT), wanted)


def test_a_stream_that_nobody_begins_costs_nothing(omni: LowVRAMOmni, wanted: Result) -> None:
    omni._loader.close()
    waiting = omni.stream(ASKED, **SHORT)
    assert same_reply(omni.generate(ASKED, **SHORT), wanted)
    waiting.close()
    assert list(waiting) == []


def test_a_slow_reader_gets_the_same(omni: LowVRAMOmni, wanted: Result) -> None:
    events = []
    for event in omni.stream(ASKED, **SHORT):
        time.sleep(0.02)
        events.append(event)
    assert isinstance(events[-1], Finished)
    assert same_reply(events[-1].result, wanted)
