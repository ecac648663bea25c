"""Whole requests with options that may change results: what they change, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowvram import LowVRAMOmni, Result
from lowvram.planner.question import Question
from lowvram.pocket import make_checkpoint

WORDS = [{"role": "user", "content": "Say something."}]
SHORT: dict[str, Any] = {"max_new_tokens": 6, "max_speech_seconds": 0.8}
BOUNDS = {"head8": 0.02, "talker8": 0.02, "kv8": 0.02, "vocoder16": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "pocket", seed=5)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Result:
    return answered(folder)[0]


def answered(folder: Path, *allow: str, **options: Any) -> tuple[Result, tuple[str, ...]]:
    with LowVRAMOmni.from_pretrained(folder, device="cpu", allow=allow, **options) as omni:
        used = omni.plan(WORDS, **SHORT).used
        found = omni.generate(WORDS, **SHORT)
    for row in found.report.phases:
        assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes
    errors = found.report.option_errors
    assert set(errors) == set(used)
    for name, error in errors.items():
        assert 1e-4 < error < BOUNDS[name]
        assert f"{name} moves " in str(found.report)
    return found, used


def test_without_any_nothing_is_rounded(plain: Result) -> None:
    assert plain.report.option_errors == {} and plain.audio is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("allow", [("talker8",), ("vocoder16",), ("kv8",), tuple(BOUNDS)])
def test_a_reply_with_options(
    folder: Path, plain: Result, allow: tuple[str, ...], dtype: str
) -> None:
    found, used = answered(folder, *allow, dtype=dtype)
    assert set(used) == {name for name in allow if name != "head8" or dtype == "bfloat16"}
    if not {"head8", "kv8"} & set(used):
        assert found.text == plain.text
    if dtype == "bfloat16" and used == ("vocoder16",):
        assert found.codes == plain.codes
        assert found.audio is not None and plain.audio is not None
        moved = np.linalg.norm(found.audio - plain.audio) / np.linalg.norm(plain.audio)
        assert 0 < moved < 0.1
    if dtype == "bfloat16" and "vocoder16" not in used and found.codes == plain.codes:
        np.testing.assert_array_equal(found.audio, plain.audio)


def test_a_part_is_built_as_the_plan_says_request_by_request(
    folder: Path, plain: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = Question.ways
    with LowVRAMOmni.from_pretrained(folder, device="cpu", allow=("talker8",)) as omni:
        roomy = omni.plan(WORDS, **SHORT)
        first = omni.generate(WORDS, **SHORT)
        assert roomy.used == ("talker8",) and "talker" in omni.resident
        assert omni.plan(WORDS, **SHORT).bytes_to_move < roomy.bytes_to_move
        # As with a budget that no whole Talker fits in.
        monkeypatch.setattr(Question, "ways", lambda question: every(question)[1:])
        without = omni.plan(WORDS, **SHORT)
        second = omni.generate(WORDS, **SHORT)
        monkeypatch.undo()
        third = omni.generate(WORDS, **SHORT)
    assert without.used == () and any("is not used: the Talker" in r for r in without.reasons)
    assert first.report.option_errors == third.report.option_errors != {}
    assert second.report.option_errors == {} and second.codes == plain.codes
    # Each read the Talker anew.
    assert second.report.bytes_host_to_device == third.report.bytes_host_to_device > 0
    assert third.codes == first.codes


def test_a_rounded_talker_gives_up_where_it_would_have_to_stream(folder: Path) -> None:
    with LowVRAMOmni.from_pretrained(folder, device="cpu", allow=("talker8",)) as omni:
        omni.generate(WORDS, **SHORT)
        assert not omni._loader.streams("talker") and omni._loader.streams("text")
