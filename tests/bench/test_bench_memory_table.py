"""The table of `bench memory`: cells, growth, and that the README's is made from measured cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowvram.bench.memory_table import markdown_table, memory_table

GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "benchmarks" / "results" / "memory-2026-11-21.json"


def case(seconds: int, mode: str, measured: float, reference: float | None = None) -> Any:
    return {
        "video_seconds": seconds,
        "prompt_tokens": 781 * seconds,
        "mode": mode,
        "measured_peak_bytes": int(measured * GIB),
        "predicted_peak_bytes": int(measured * GIB) + GIB // 10,
        "reference_bytes": None if reference is None else int(reference * GIB),
    }


CASES = [
    case(60, "stock", 30, 30.31),
    case(60, "resident", 7.25, 30.31),
    case(15, "stock", 11.4, 11.77),
    case(15, "resident", 5.4, 11.77),
]


def test_the_text_has_a_line_for_each_length_and_the_growth() -> None:
    lines = memory_table(CASES).splitlines()
    assert " ".join(lines[1].split()) == "15 s 11,715 11.77 11.40 (11.50) 5.40 (5.50) - -"
    assert lines[2].split()[:4] == ["60", "s", "46,860", "30.31"]
    assert lines[-1] == (
        "each further token of the prompt: official demo, measured 554.9 KiB, "
        "every layer stays 55.2 KiB"
    )


def test_one_length_has_no_growth() -> None:
    assert "each further" not in memory_table(CASES[:2])
    assert "each further" not in markdown_table(CASES[:2])
    assert memory_table([case(7, "resident", 4)]).splitlines()[1].split()[3] == "-"


def test_the_readme_s_table_is_markdown() -> None:
    rows = markdown_table(CASES).splitlines()
    assert {row.count("|") for row in rows} == {8}
    assert rows[2] == "| 15 s | 11,715 | 11.77 | 11.40 | 5.40 | - | - |"
    assert rows[-1] == "| each further token |  |  | 554.9 KiB | 55.2 KiB |  |  |"


def test_the_readme_s_table_is_that_of_the_measured_cases() -> None:
    cases = json.loads(MEASURED.read_text(encoding="utf-8"))
    assert markdown_table(cases) in (ROOT / "README.md").read_text(encoding="utf-8")
    peaks = {(c["video_seconds"], c["mode"]): c["measured_peak_bytes"] / GIB for c in cases}
    promised = {15: 6.0, 30: 6.8, 60: 8.0}
    assert all(peaks[length, "resident"] <= most for length, most in promised.items())
    assert peaks[60, "minimum"] <= 3.0
