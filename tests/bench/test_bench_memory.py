"""`bench memory`: every mode for every length, and the sizes that are promised at true shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lowvram.bench.memory import MODES, bench_memory
from lowvram.cli.bench import shapes
from lowvram.cli.main import main
from lowvram.errors import UsageError

GIB = 2**30
FIELDS = {
    "video_seconds",
    "prompt_tokens",
    "mode",
    "measured_peak_bytes",
    "predicted_peak_bytes",
    "reference_bytes",
}


def test_every_mode_for_every_length_as_json(capsys: Any) -> None:
    assert main(["bench", "memory", "--video-seconds", "1", "3", "--json", "-q"]) == 0
    cases = json.loads(capsys.readouterr().out)
    assert [(c["video_seconds"], c["mode"]) for c in cases] == [
        (seconds, mode) for seconds in (1, 3) for mode in MODES
    ]
    for case in cases:
        assert case.keys() >= FIELDS
        assert case["prompt_tokens"] == 781 * case["video_seconds"]
        assert case["reference_bytes"] is None
        if case["mode"] != "stock":
            assert case["measured_peak_bytes"] == sum(case["parts"].values())
            assert case["measured_peak_bytes"] <= case["predicted_peak_bytes"]


def test_the_table_is_for_readers(capsys: Any) -> None:
    assert main(["bench", "memory", "--video-seconds", "1", "-q"]) == 0
    assert "GiB measured, in brackets GiB predicted" in capsys.readouterr().out


def test_a_7b_at_its_longest_published_video() -> None:
    name = "Qwen2.5-Omni-7B-AWQ"
    ours = ("resident", "kv-host", "minimum")
    cases = bench_memory(name, shapes(name), [60], modes=ours)
    peaks = {case.mode: case.measured_peak_bytes / GIB for case in cases}
    assert peaks["resident"] <= 8.0 and peaks["minimum"] <= 3.0
    # Keys and values of the prompt: 56 KiB a token there, two layers' here.
    assert 2.3 < peaks["resident"] - peaks["kv-host"] < 2.6
    for case in cases:
        assert case.reference_bytes == 32_545_114_685
        assert case.measured_peak_bytes <= case.predicted_peak_bytes
        assert case.predicted_peak_bytes <= 1.10 * case.measured_peak_bytes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cpu"], "on no device"),
        (["-m", "nothing/here"], "no shapes are known"),
        (["--video-seconds", "0"], "wanted 1 or more"),
        (["--video-seconds", "soon"], "invalid int value"),
    ],
)
def test_what_cannot_be_counted(flags: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", "memory", *flags]) == UsageError.exit_code
    assert message in capsys.readouterr().err
