"""`plan` for models that are not there: by name, by config.json, by lengths instead of media."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lowvram import hub
from lowvram.cli.main import main
from lowvram.errors import CheckpointError
from lowvram.pocket import make_checkpoint
from lowvram.specs import SPECS

AWQ = "Qwen2.5-Omni-7B-AWQ"
GIB = 2**30
MEDIA = Path(__file__).resolve().parents[2] / "demos" / "media"


def planned(capsys: Any, *argv: str, code: int = 0) -> dict[str, Any]:
    assert main(["plan", *argv, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Path:
        raise CheckpointError("the hub was asked")

    monkeypatch.setattr(hub, "download", refuse)


@pytest.mark.parametrize(("seconds", "tokens"), [(15, 11_715), (30, 23_430), (60, 46_860)])
def test_a_second_of_video_is_781_tokens(capsys: Any, seconds: int, tokens: int) -> None:
    found = planned(capsys, "-m", AWQ, "--video-seconds", str(seconds), "--max-memory", "8GiB")
    assert found["prompt_tokens"] == tokens
    assert found["fits"] and found["device"] == "cuda"
    assert found["context_bytes"] == int(0.45 * GIB)
    assert any("context 460.8 MiB is assumed" in line for line in found["reasons"])
    assert found["predicted_peak_bytes"] == max(p["predicted_peak_bytes"] for p in found["phases"])
    for phase in found["phases"]:
        held = sum(phase["parts"].values())
        assert phase["predicted_peak_bytes"] == found["context_bytes"] + held


def test_the_published_case_stays_below_what_was_promised(capsys: Any) -> None:
    for seconds, budget in ((15, "6.0GiB"), (30, "6.8GiB"), (60, "8.0GiB")):
        question = ["-m", AWQ, "--video-seconds", str(seconds)]
        found = planned(capsys, *question, "--max-memory", budget)
        assert found["residency"]["text"] in ("on demand", "resident")
        assert found["kv"]["thinker"] == "device"
    assert found["minimum_budget_bytes"] <= 3.0 * GIB


def test_growth_with_the_prompt(capsys: Any) -> None:
    from lowvram.conversation import PromptShape
    from lowvram.planner import config_facts, plan_mode
    from lowvram.settings import GenerationSettings

    model = config_facts(AWQ, SPECS[AWQ].config)

    def peak(tokens: int, mode: Any) -> int:
        shape = PromptShape(tokens=tokens, next_position=900)
        settings = GenerationSettings(speech=False)
        return plan_mode(model, shape, settings, mode=mode).predicted_peak_bytes

    for mode, most in (("resident", 60), ("kv-host", 6)):
        assert peak(46_860, mode) - peak(11_715, mode) <= most * 1024 * (46_860 - 11_715)


def test_the_smallest_budget_is_exact(capsys: Any) -> None:
    question = ["-m", AWQ, "--video-seconds", "60"]
    refused = planned(capsys, *question, "--max-memory", "1GiB", code=3)
    assert not refused["fits"] and refused["knobs"]
    least = refused["minimum_budget_bytes"]
    assert planned(capsys, *question, "--max-memory", str(least))["fits"]
    planned(capsys, *question, "--max-memory", str(int(least * 0.99)), code=3)


def test_a_refusal_says_what_each_change_saves(capsys: Any) -> None:
    assert main(["plan", "-m", AWQ, "--video-seconds", "60", "--max-memory", "1GiB"]) == 3
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "smallest budget that would do is 1.91 GiB" in err
    assert "--max-pixels halved" in err and " less)" in err
    assert main(["plan", "-m", AWQ, "--prompt-tokens", "900", "--max-memory", "1GiB"]) == 3
    out, err = capsys.readouterr()
    assert "--no-speech" in err and " less)" in err
    (line,) = (one for one in out.splitlines() if one.startswith("- vocoder16 would lower"))
    assert line.endswith(", where allowed") and "--allow vocoder16 " in err


def test_what_streams_and_how_fast_is_said_in_plain_words(capsys: Any) -> None:
    assert main(["plan", "--device", "cpu", "--max-memory", "16MiB"]) == 3
    out = capsys.readouterr().out
    assert "\n- streamed units come from the file: the device is host memory\n" in out
    assert main(["plan", "--device", "cpu", "--no-speech"]) == 0
    assert re.search(r"decode: about \d+ tokens a second over 48 tokens", capsys.readouterr().out)
    assert main(["plan", "--device", "cpu"]) == 0
    first = re.search(r"the first sound after about (\S+) s, the last", capsys.readouterr().out)
    assert first and float(first[1]) > 0


def test_a_config_alone_is_enough(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "only-config"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SPECS[AWQ].raw))
    plans = [
        planned(capsys, "-m", str(model), "--video-seconds", "15", "--max-memory", "8GiB")
        for model in (AWQ, folder, folder / "config.json")
    ]
    assert plans[0]["phases"] == plans[1]["phases"] == plans[2]["phases"]


def test_a_hub_model_that_is_not_known_gives_its_config_alone(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(hub_id: str, *, offline: bool, files: Any) -> Path:
        asked.append((hub_id, offline, tuple(files)))
        (tmp_path / "config.json").write_text(json.dumps(SPECS[AWQ].raw))
        return tmp_path

    monkeypatch.setattr(hub, "download", download)
    assert planned(capsys, "-m", "somebody/omni", "-p", "hi", "--max-memory", "8GiB")["fits"]
    assert asked == [("somebody/omni", False, hub.CONFIG_FILES)]


def test_without_a_budget_an_absent_device_gets_what_everything_needs(capsys: Any) -> None:
    found = planned(capsys, "-m", "Qwen2.5-Omni-3B-AWQ", "--device", "npu", "--prompt-tokens", "9")
    assert set(found["residency"].values()) <= {"resident", "host", "unused"}
    assert any("is not here to be asked" in line for line in found["reasons"])
    assert found["predicted_peak_bytes"] + found["guard_bytes"] <= found["budget_bytes"]


def test_lengths_add_up(capsys: Any) -> None:
    many = [
        "--images",
        "2",
        "--audio-seconds",
        "4",
        "--prompt-tokens",
        "10",
        "--max-memory",
        "9GiB",
    ]
    assert planned(capsys, "-m", AWQ, *many)["prompt_tokens"] == 2 * 756 + 100 + 10
    silent = ["--video-seconds", "15", "--no-audio-in-video", "--max-memory", "9GiB"]
    assert planned(capsys, "-m", AWQ, *silent)["prompt_tokens"] == 15 * 756


def test_lengths_work_with_weights_too(tmp_path: Path, capsys: Any) -> None:
    folder = make_checkpoint(tmp_path / "model")
    found = planned(capsys, "-m", str(folder), "--prompt-tokens", "100", "--device", "cpu")
    assert found["prompt_tokens"] == 100 and found["device"] == "cpu"


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["-m", AWQ, "--video-seconds", "0"], 2, "--video-seconds is 0.0; wanted above 0"),
        (["-m", AWQ, "--audio-seconds", "-1"], 2, "--audio-seconds is -1.0; wanted above 0"),
        (["-m", AWQ, "--images", "-1"], 2, "--images is -1; wanted 0 or more"),
        (["-m", AWQ, "--prompt-tokens", "0"], 2, "--prompt-tokens is 0; wanted 1 or more"),
        (["-m", AWQ, "--images", "0"], 2, "a prompt without tokens"),
        (["-m", AWQ, "--images", "1", "-p", "hi"], 2, "--images in place of real text"),
        (["-m", AWQ, "--video-seconds", "2000"], 2, "the prompt takes "),
        (["-m", "somebody/omni", "-p", "hi"], 1, "the hub was asked"),
        (["-m", "no-such-model"], 1, "no-such-model is no folder, nor a known model; wanted"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(capsys: Any, argv: list[str], code: int, message: str) -> None:
    assert main(["plan", *argv, "--max-memory", "8GiB"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"lowvram-demo: error: {message}")


def test_a_picture_cannot_be_half_as_long(capsys: Any) -> None:
    for medium, clip in (("--image", False), ("--video", True)):
        path = MEDIA / ("clip.mp4" if clip else "picture.png")
        asked = [medium, str(path), "--min-pixels", "1000000", "--device", "cpu"]
        assert main(["plan", *asked, "--max-memory", "1MiB"]) == 3
        assert ("half as long a clip" in capsys.readouterr().err) is clip
