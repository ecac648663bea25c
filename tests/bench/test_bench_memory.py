"""`bench memory`: every mode for every length, and the sizes that are promised at true shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lowvram.bench import memory
from lowvram.bench.memory import MODES, bench_memory
from lowvram.bench.memory_request import REPLY_CODES
from lowvram.cli.bench import shapes
from lowvram.cli.main import main
from lowvram.engine.talk import TalkLoop
from lowvram.errors import UsageError

GIB = 2**30
NAME = "Qwen2.5-Omni-7B-AWQ"
FIELDS = {
    "video_seconds",
    "prompt_tokens",
    "mode",
    "measured_peak_bytes",
    "predicted_peak_bytes",
    "reference_bytes",
}


def test_every_mode_as_json(capsys: Any) -> None:
    assert main(["bench", "memory", "--video-seconds", "2", "--json", "-q"]) == 0
    cases = json.loads(capsys.readouterr().out)
    assert [case["mode"] for case in cases] == list(MODES)
    for case in cases:
        assert case.keys() >= FIELDS
        assert (case["video_seconds"], case["prompt_tokens"]) == (2, 2 * 781)
        assert case["reference_bytes"] is None
        if case["mode"] != "stock":
            assert case["measured_peak_bytes"] == sum(case["parts"].values())
            assert case["measured_peak_bytes"] <= case["predicted_peak_bytes"]


def test_the_table_is_for_readers(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[Any] = []

    def no_cases(*given: Any, **options: Any) -> list[Any]:
        asked.append(given)
        return []

    monkeypatch.setattr(memory, "bench_memory", no_cases)
    assert main(["bench", "memory", "-m", "qwen/qwen2.5-omni-7b-awq", "-q"]) == 0
    assert "GiB measured, in brackets GiB predicted" in capsys.readouterr().out
    assert asked == [(NAME, shapes(NAME), (15, 30, 60))]


def test_every_length_for_every_mode() -> None:
    cases = bench_memory("pocket", shapes("pocket"), [3, 1], modes=("stock",))
    assert [case.prompt_tokens for case in cases] == [3 * 781, 781]


def test_a_7b_at_true_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    step = TalkLoop.step

    def counted(self: TalkLoop, reply: Any) -> Any:
        steps.append(1)
        return step(self, reply)

    monkeypatch.setattr(TalkLoop, "step", counted)
    short = bench_memory(NAME, shapes(NAME), [4], modes=("resident", "kv-host"))
    cases = [*short, *bench_memory(NAME, shapes(NAME), [60], modes=("minimum",))]
    resident, on_host, smallest = (case.measured_peak_bytes for case in cases)
    assert len(steps) <= 3 * (REPLY_CODES + 2), "the reply is to end once all is allocated"
    # The card's 15 s are allowed 6.0 GiB; 11 s more are worth 56 KiB a token.
    assert resident + 56 * 1024 * 781 * 11 <= 6.0 * GIB
    assert smallest <= 3.0 * GIB
    # Keys and values of 56 KiB a token there, and of two layers here.
    assert resident - on_host == pytest.approx(52 * 1024 * (4 * 781 + 1024), rel=0.02)
    assert [case.reference_bytes for case in cases] == [None, None, 32_545_114_685]
    for case in cases:
        assert case.measured_peak_bytes <= case.predicted_peak_bytes
        assert case.predicted_peak_bytes <= 1.10 * case.measured_peak_bytes
        assert case.budget_bytes is not None and case.predicted_peak_bytes < case.budget_bytes


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
