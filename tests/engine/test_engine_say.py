"""A given text as speech."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from replies import same_reply
from torch import Tensor

from lowvram import AudioChunk, Finished, LowVRAMOmni, Result, TextDelta, UsageError
from lowvram.engine.run import Run
from lowvram.engine.thinker import Thinker

SHORT: dict[str, Any] = {"max_speech_seconds": 1.0}
TEXT = "Good morning! The train is late — by 20 minutes. 😀"


@pytest.fixture(scope="module")
def omni() -> Iterator[LowVRAMOmni]:
    with LowVRAMOmni.from_pretrained("pocket", device="cpu") as loaded:
        yield loaded


def said(omni: LowVRAMOmni, text: str, **options: Any) -> Result:
    *events, last = omni.speak(text, **SHORT | options)
    assert isinstance(last, Finished)
    written = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert written == last.result.text
    assert any(isinstance(event, AudioChunk) for event in events)
    return last.result


def test_the_text_is_the_reply_and_is_spoken(omni: LowVRAMOmni) -> None:
    result = said(omni, TEXT)
    assert result.text == TEXT
    assert len(result.codes) == 50 and result.audio is not None
    assert len(result.audio) == 50 * 480


def test_what_is_said_steers_the_sound(omni: LowVRAMOmni) -> None:
    # The question is the same, so that only the reply's own states differ.
    question = [{"role": "user", "content": "Read this."}]
    one, other = (omni.generate(question, say=text, **SHORT) for text in ("Yes, I do.", "Never!"))
    assert one.codes != other.codes
    assert omni.generate(question, say="Yes, I do.", **SHORT).codes == one.codes


def test_a_reply_that_is_drawn_sounds_the_same_when_it_is_given(omni: LowVRAMOmni) -> None:
    question = [{"role": "user", "content": "Say something."}]
    drawn = omni.generate(question, max_new_tokens=9, **SHORT)
    given = omni.generate(question, say=drawn.text, **SHORT)
    words = omni._tokenizer.encode(drawn.text.strip())
    assert list(given.tokens[:-1]) == words
    if list(drawn.tokens[:-1]) == words:
        assert given.codes == drawn.codes


def test_special_tokens_in_the_text_are_text(omni: LowVRAMOmni) -> None:
    result = said(omni, "One <|im_end|> two")
    assert result.text == "One <|im_end|> two"


def test_the_bounds_follow_the_text(omni: LowVRAMOmni) -> None:
    question = [{"role": "user", "content": "Read this."}]
    short, long = (omni.plan(question, say="word " * count) for count in (2, 400))
    assert long.predicted_peak_bytes > short.predicted_peak_bytes
    assert len(said(omni, "word " * 40, max_new_tokens=3).tokens) > 40


@pytest.mark.parametrize("seconds", [0.3, 1.0], ids=["after the text", "while it is written"])
def test_the_thinker_stops_when_nothing_more_is_heard(
    seconds: float, omni: LowVRAMOmni, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each code hears one state: the rest of a long text is only written."""
    steps: list[int] = []
    step = Thinker.step

    def counted(self: Thinker, embed: Tensor, position: int) -> tuple[Tensor, Tensor]:
        steps.append(position)
        return step(self, embed, position)

    monkeypatch.setattr(Thinker, "step", counted)
    text = ("The quick brown fox jumps over the lazy dog. " * 10).strip()
    found = said(omni, text, max_speech_seconds=seconds)
    assert found.text == text and len(found.tokens) > 60
    assert len(steps) == len(found.codes) == 50 * seconds
    monkeypatch.setattr(Run, "_needs_thinking", lambda *_: True)
    wanted = said(omni, text, max_speech_seconds=seconds)
    assert len(steps) > 120 and same_reply(found, wanted)


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_text_is_refused(omni: LowVRAMOmni, text: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        next(omni.speak(text))


def test_without_a_voice_it_is_refused(omni: LowVRAMOmni) -> None:
    with pytest.raises(UsageError, match="nothing is to be spoken"):
        next(omni.speak("Hello", return_audio=False))
    with (
        LowVRAMOmni.from_pretrained("pocket", device="cpu", speech=False) as mute,
        pytest.raises(UsageError, match="nothing is to be spoken"),
    ):
        next(mute.speak("Hello"))
