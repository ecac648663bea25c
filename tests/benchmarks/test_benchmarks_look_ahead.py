"""How far streamed frames are from the whole utterance's, on one narrow network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import what lies beside them."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


def test_deviation_falls_with_look_ahead_and_is_not_that_of_the_official_constants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import look_ahead

    monkeypatch.setattr(look_ahead, "STDS", (0.15,))
    path = tmp_path / "a.json"
    small = ["--networks", "1", "--codes", "86", "--hidden", "32"]
    assert look_ahead.main([*small, "--json", str(path)]) == 0
    rows = {row["pieces"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    assert capsys.readouterr().out.count("\n") == len(rows) + 1 == 8
    off = [rows[f"2, 2, 4, 8; look-ahead {blocks}"] for blocks in look_ahead.LOOK_AHEAD]
    assert off[0]["rms"] > 3 * off[1]["rms"] > 9 * off[2]["rms"] > 9 * off[3]["rms"] > 0
    assert off[-1]["max"] < 1e-5 < off[1]["max"] < 0.05
    # The same seams: what the official constants add comes from the left.
    same, official = rows["4; look-ahead 1"], rows["official 48/24/12"]
    assert same["rms"] <= official["rms"] and same["max"] <= 1.01 * official["max"]
    for row in rows.values():
        assert row["mean"] <= row["rms"] <= row["max"] and row["p95"] <= row["max"]
