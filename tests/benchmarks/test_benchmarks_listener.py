"""The table of piece sizes, from a report and from given speeds."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from lowvram.engine.pieces import VocodeSettings, passes

FOLDER = Path(__file__).parents[2] / "benchmarks"
TOLD = {"phase_seconds": {"decode": 2.0, "talk": 4.0, "vocode": 2.0}, "codes": 200}
GIVEN = ["--codes-per-s", "50", "--tokens-per-s", "10", "--dit", "0.25", "--vocoder", "0.05"]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import what lies beside them."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


def test_rows_of_given_speeds(capsys: pytest.CaptureFixture[str]) -> None:
    import listener

    length = ["--seconds", "1", "--tokens", "11"]
    assert listener.main([*GIVEN, *length, "--blocks", "2,2,4,8", "--json"]) == 0
    rows = {row["order"]: row for row in json.loads(capsys.readouterr().out)}
    # 10 tokens, 36 codes, 72 frames through the DiT, 48 through the vocoder.
    first = 10 / 10 + 36 / 50 + 0.25 * 0.72 + 0.05 * 0.48
    assert rows["interleaved"]["first_sound_s"] == pytest.approx(first)
    assert rows["staged"]["first_sound_s"] == pytest.approx(first)
    assert rows["apart"]["first_sound_s"] == pytest.approx(first + 14 / 50)
    # Then 26 codes through the DiT, and through the vocoder what has not sounded yet.
    _, *waves = [step.length for step in passes(VocodeSettings(), 50) if step.stage == "wave"]
    total = first + 14 / 50 + 0.25 * 0.52 + 0.05 * sum(waves) / 100
    assert all(row["total_s"] == pytest.approx(total) and row["best"] for row in rows.values())


def test_a_report_and_what_is_given_in_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import listener

    path = tmp_path / "reply.json"
    path.write_text(json.dumps(TOLD | {"reply_tokens": 40}), encoding="utf-8")
    options = listener.parser().parse_args(["--report", str(path), "--codes-per-s", "80"])
    times = listener.step_times(options)
    assert (times.think_s, times.talk_s) == (0.05, 0.0125)
    assert 0 < times.wave_s < times.mel_s < 2.0 / 400
    assert listener.main(["--report", str(path)]) == 0
    told = capsys.readouterr().out
    assert told.count("2, 2, 4, 8") == told.count(" *") == 3
    # A heading over every column, which ends where that does.
    head, row = (re.finditer(r"\S+(?: \S+)*", line[22:]) for line in told.splitlines()[1:3])
    assert [cell.end() for cell in head] == [cell.end() for cell in row]


@pytest.mark.parametrize("bad", [[], ["--codes-per-s", "9"], ["--report", "no/such.json"]])
def test_without_times_one_line_says_so(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import listener

    assert listener.main(bad) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
