"""The script that times the Talker's loop, on the built-in model's Talker."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowvram.config import OmniConfig
from lowvram.pocket import pocket_config

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_loop_and_bare_passes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import talker_loop

    pocket = SimpleNamespace(config=OmniConfig.from_dict(pocket_config()))
    monkeypatch.setattr(talker_loop, "SPECS", {"pocket": pocket})
    path = tmp_path / "a.json"
    asked = ["--model", "pocket", "--codes", "12", "--json", str(path)]
    assert talker_loop.main(asked) == 0
    told = json.loads(path.read_text(encoding="utf-8"))
    (row,) = told["rows"]
    assert row["codes"] == 12
    assert row["codes_per_s"] == pytest.approx(1000 / row["step_ms"], rel=0.01)
    assert row["step_over_pass"] > 0
    assert not row["recorded"] and row["notes"] == []
    sys.modules.pop("talker_loop")
