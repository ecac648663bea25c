"""Talkers and texts that nobody hopes for: speech that never ends, ends at once or repeats, replies
of one token, and prompts that are empty, long or full of emoji."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replies import open_model
from safetensors.torch import load_file, save_file

from lowvram import AudioChunk, Finished, LowVRAMOmni, Result, TextDelta
from lowvram.pocket import make_checkpoint, pocket_config

CODES_A_SECOND = 50
SAMPLES_A_CODE = 480
WORDS: list[dict[str, Any]] = [{"role": "user", "content": "Say something."}]
LIKELIEST: dict[str, Any] = {"talker_temperature": 0.0, "talker_repetition_penalty": 1.0}


def model(folder: Path, *, flat: Sequence[str] = (), **ends: int) -> LowVRAMOmni:
    """A small model; every output of the heads named in `flat` is zero, so that the likeliest token
    is the same one at every step. `text` and `speech` are the ids that end those, where given."""
    raw = pocket_config()
    if "text" in ends:
        raw["thinker_config"]["eos_token_id"] = ends["text"]
    if "speech" in ends:
        raw["talker_config"]["tts_codec_end_token_id"] = ends["speech"]
    make_checkpoint(folder, seed=5, config=raw)
    if flat:
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        for name in flat:
            tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, file)
    return LowVRAMOmni.from_pretrained(folder, device="cpu")


def most_codes(omni: LowVRAMOmni, options: dict[str, Any]) -> int:
    seconds = options.get("max_speech_seconds")
    return round(CODES_A_SECOND * seconds) or 1 if seconds else omni.checkpoint.generation.max_codes


def replied(omni: LowVRAMOmni, conversation: Any = None, **options: Any) -> Result:
    """The reply, after a look at every event of it."""
    events = list(omni.stream(conversation or WORDS, **options))
    (finished,) = (event for event in events if isinstance(event, Finished))
    assert events[-1] is finished
    result = finished.result
    chunks = [event for event in events if isinstance(event, AudioChunk)]
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == result.text
    assert sum((chunk.codes for chunk in chunks), ()) == result.codes
    assert result.audio is not None
    assert len(result.audio) == sum(len(chunk.samples) for chunk in chunks)
    assert len(result.audio) == SAMPLES_A_CODE * len(result.codes)
    assert result.audio.dtype == np.float32 and np.isfinite(result.audio).all()
    assert np.abs(result.audio).max(initial=0) <= 1
    assert result.report.audio_seconds == len(result.codes) / CODES_A_SECOND
    assert result.report.codes == len(result.codes)
    assert result.report.speech_cut_off == (len(result.codes) >= most_codes(omni, options))
    for row in result.report.phases:
        assert row.measured_peak_bytes <= row.predicted_peak_bytes
    return result


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LowVRAMOmni]:
    with model(tmp_path_factory.mktemp("models") / "m") as opened:
        yield opened


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.5, 0.74, 1.1])
def test_a_talker_that_never_ends_stops_at_its_bound(omni: LowVRAMOmni, seconds: float) -> None:
    result = replied(omni, max_new_tokens=2, max_speech_seconds=seconds)
    assert len(result.codes) == max(1, round(CODES_A_SECOND * seconds))
    assert result.report.speech_cut_off and "cut off at its bound" in str(result.report)


def test_a_talker_that_repeats_itself_is_heard_to_its_bound(tmp_path: Path) -> None:
    with model(tmp_path / "m", flat=["talker.codec_head.weight"]) as omni:
        result = replied(omni, max_new_tokens=3, max_speech_seconds=0.8, **LIKELIEST)
    assert len(result.codes) == 40 and len(set(result.codes)) == 1
    assert result.audio is not None and np.abs(result.audio).max() > 1e-3


@pytest.mark.parametrize("tight", [False, True], ids=["resident", "streamed"])
def test_a_talker_that_ends_at_once_leaves_an_empty_speech(tmp_path: Path, tight: bool) -> None:
    flat = ["talker.codec_head.weight"]
    with model(tmp_path / "repeats", flat=flat) as omni:
        (code,) = set(omni.generate(WORDS, max_speech_seconds=0.1, **LIKELIEST).codes)
    options: dict[str, Any] = {"max_new_tokens": 3, "max_speech_seconds": 1, **LIKELIEST}
    model(tmp_path / "ends", flat=flat, speech=code).close()
    with open_model(tmp_path / "ends", WORDS, options, tight=tight) as omni:
        result = replied(omni, **options)
        assert result.codes == () and len(result.tokens) == 3
        assert result.audio is not None and result.audio.shape == (0,)
        report = result.report
        assert (report.first_audio_s, report.longest_gap_s, report.real_time_factor) == (None,) * 3
        assert not report.speech_cut_off
        assert "0.00 s of speech;" in str(report) and report.to_json()["codes"] == 0


@pytest.mark.parametrize("speech", [False, True])
def test_a_reply_of_one_token_says_nothing(omni: LowVRAMOmni, speech: bool) -> None:
    longer = omni.generate(WORDS, max_new_tokens=2, return_audio=speech, max_speech_seconds=0.1)
    result = omni.generate(WORDS, max_new_tokens=1, return_audio=speech)
    assert result.tokens == longer.tokens[:1] and longer.text.startswith(result.text)
    assert result.codes == () and bool(longer.codes) == speech
    assert (None if result.audio is None else len(result.audio)) == (0 if speech else None)


def test_a_thinker_that_ends_at_once_says_nothing(tmp_path: Path) -> None:
    flat = ["thinker.lm_head.weight"]
    with model(tmp_path / "repeats", flat=flat) as omni:
        (token,) = set(omni.generate(WORDS, max_new_tokens=3, return_audio=False).tokens)
    with model(tmp_path / "ends", flat=flat, text=token) as omni:
        result = replied(omni)
    assert (result.text, result.tokens, result.codes) == ("", (token,), ())


FACES = "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea\u2764\ufe0f"

TEXTS = {
    "empty": "",
    "blank": " \n\t ",
    "long": ("The quick brown fox jumps over the lazy dog. " * 112)[:5000],
    "emoji": FACES * 40,
    "controls": "\x00\x07\u202e\u200b\ufeff\uffff",
    "markers": "<|im_end|>\n<|im_start|>assistant\n<|AUDIO|><|vision_bos|><|VIDEO|><|vision_eos|>",
}


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_is_answered_and_budgeted(omni: LowVRAMOmni, text: str) -> None:
    asked = [{"role": "user", "content": [{"type": "text", "text": TEXTS[text]}]}]
    options: dict[str, Any] = {"max_new_tokens": 3, "max_speech_seconds": 0.1}
    plan = omni.plan(asked, **options)
    result = replied(omni, asked, **options)
    assert len(result.tokens) == 3 and len(result.codes) == 5
    assert plan.fits and result.report.measured_peak_bytes <= plan.budget_bytes
    plain = omni.plan([{"role": "user", "content": TEXTS[text]}], **options)
    assert plain.predicted_peak_bytes == plan.predicted_peak_bytes


def test_wild_replies_are_whole_characters(omni: LowVRAMOmni) -> None:
    """Tokens of half a character, of a marker, of bytes that are no text."""
    options: dict[str, Any] = {"temperature": 100.0, "max_new_tokens": 60}
    for seed in range(3):
        result = replied(omni, seed=seed, max_speech_seconds=0.1, **options)
        assert len(set(result.tokens)) > 10 and len(result.codes) == 5
        assert result.text == omni.checkpoint.tokenizer().decode(result.tokens)
        result.text.encode()


@pytest.mark.parametrize("text", ["emoji", "long"])
def test_every_given_text_is_spoken_as_it_is(omni: LowVRAMOmni, text: str) -> None:
    given = TEXTS[text][:80].strip()
    result = replied(omni, say=given, max_speech_seconds=0.1)
    assert result.text == given and len(result.codes) == 5
