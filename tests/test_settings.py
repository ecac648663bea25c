"""What a caller may set, and what is said of what is none. No torch."""

from __future__ import annotations

from typing import Any

import pytest

from lowvram.conversation.messages import parse_messages
from lowvram.errors import UsageError
from lowvram.options import Options, split_options, with_system
from lowvram.planner import check_options

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("temperature", [-1, NAN, INF, "hot", None, True], "wanted 0 (greedy) or more"),
        ("talker_temperature", [-1, NAN], "wanted 0 (greedy) or more"),
        ("top_p", [0, 1.1, NAN, "1"], "wanted above 0 and at most 1"),
        ("top_k", [-1, 1.5, NAN, "3"], "wanted a whole number, 0 (off) or more"),
        ("repetition_penalty", [0, NAN, INF, "1"], "wanted above 0 (1 is off)"),
        ("max_new_tokens", [0, 2.5, NAN, "9", True], "wanted a whole number, 1 or more"),
        ("max_speech_seconds", [0, NAN, INF, "9"], "wanted above 0"),
        ("seed", [-1, 2**62, 0.5, "1"], "wanted a whole number from 0 to 2**62 - 1"),
        ("solver", ["heun", None], "wanted one of euler, rk4"),
        ("pieces", [(), (0,), (1.5,), ("2",)], "wanted one or more blocks in each"),
        ("pieces", [2, "2,2", None], "wanted a list of blocks"),
        ("look_ahead", [-1, 0.5, None], "wanted 0 or more blocks"),
        ("say", [3, "a\udcff"], "say is "),
        ("voice", ["Ethan"], "unknown option 'voice'; wanted some of "),
    ],
)
def test_an_option_that_is_none(name: str, values: list[Any], wanted: str) -> None:
    for value in values:
        options: Any = {name: value}
        with pytest.raises(UsageError) as raised:
            split_options(options, seed=0, speech=True)
        said = str(raised.value)
        assert name.removeprefix("talker_") in said and wanted in said and "\n" not in said


def test_numbers_of_every_kind_are_numbers() -> None:
    import numpy as np

    options: Options = {
        "temperature": np.float32(0.5),  # type: ignore[typeddict-item]
        "top_k": np.int64(3),  # type: ignore[typeddict-item]
        "pieces": [2, 2],
        "seed": 2**62 - 1,
        "max_speech_seconds": 3,
    }
    settings, _ = split_options(options, seed=0, speech=True)
    assert (settings.sampling.top_k, settings.pieces) == (3, (2, 2))


@pytest.mark.parametrize("system", [None, "Be short."])
@pytest.mark.parametrize(
    ("conversation", "said"),
    [
        ("Hello", "the conversation is a str; wanted a list of messages"),
        ({"role": "user", "content": "Hello"}, "the conversation is a dict; wanted a list"),
        (None, "the conversation is missing; wanted a list"),
        ([], "the conversation is empty; wanted at least one message"),
        (["Hello"], " is a str; wanted a dict with role and content"),
    ],
)
def test_a_conversation_that_is_none_is_told_as_it_was_given(
    conversation: Any, said: str, system: str | None
) -> None:
    _, media = split_options({}, seed=0, speech=True)
    with pytest.raises(UsageError, match=said):
        parse_messages(with_system(conversation, system), media)


def test_a_system_prompt_leads_where_there_is_none() -> None:
    asked = [{"role": "user", "content": "Hello"}]
    own = [{"role": "system", "content": "Mine."}, *asked]
    assert with_system(asked, "Yours.")[0] == {"role": "system", "content": "Yours."}
    assert with_system(own, "Yours.") == own and with_system(asked, None) == asked


def test_what_is_allowed_is_a_list() -> None:
    with pytest.raises(UsageError, match=r"allow is 'head8'; wanted a list of names"):
        check_options("head8")
