"""Memory over time: from the meter to levels, axes, pictures and pages."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lowvram.cli.main import main
from lowvram.errors import LowVRAMError, UsageError
from lowvram.offload import Meter, open_device
from lowvram.report import (
    Level,
    PhaseReport,
    Report,
    history_of,
    longest_gap,
    write_report,
)
from lowvram.report.axis import TimeAxis, byte_ticks
from lowvram.report.colours import colour, readable_on
from lowvram.report.history import Spell, bands, label, spells
from lowvram.report.picture import HEIGHT, LEFT, LEGEND, WIDTH, draw

GIB = 2**30
TEXT, KV, MADE = "weights/text", "kv/thinker", "activations"


def report(history: tuple[Level, ...], budget: int = 8 * GIB) -> Report:
    """A request whose decoding takes nearly all of its time."""
    rows = (("prefill", 2.0, 6), ("decode", 500.0, 5))
    return Report(
        phases=tuple(
            PhaseReport(
                name=name,
                seconds=seconds,
                predicted_peak_bytes=peak * GIB,
                measured_peak_bytes=peak * GIB - GIB // 4,
            )
            for name, seconds, peak in rows
        ),
        budget_bytes=budget,
        predicted_peak_bytes=6 * GIB,
        measured_peak_bytes=6 * GIB - GIB // 4,
        first_text_s=2.5,
        first_audio_s=None,
        total_s=503.0,
        bytes_host_to_device=GIB,
        host_peak_bytes=GIB,
        prompt_tokens=100,
        reply_tokens=10,
        codes=0,
        audio_seconds=0.0,
        seed=0,
        model="Qwen2.5-Omni-7B-AWQ",
        device="cuda:0",
        history=history,
    )


HISTORY = (
    Level(0.0, "", {"context": GIB}),
    Level(0.1, "prefill", {"context": GIB, TEXT: 3 * GIB, KV: GIB, MADE: GIB // 2}),
    Level(2.1, "decode", {"context": GIB, TEXT: 3 * GIB, KV: GIB}),
    Level(502.1, "", {"context": GIB, TEXT: 3 * GIB}),
)


def test_levels_tell_who_holds_what() -> None:
    meter = Meter(open_device("cpu"))
    with meter.phase("prefill"):
        meter.hold("weights", "text", 500)
        meter.hold("kv", "thinker", 40)
        meter.hold("weights", "talker", 0)
    levels = history_of(meter.timeline)
    assert levels[-1].held == {TEXT: 500, KV: 40} and levels[-1].total == 540
    assert bands(levels) == [TEXT, KV]
    assert history_of(meter.timeline[:1])[0].held == {}


def test_phases_follow_each_other_along_the_axis() -> None:
    assert spells(HISTORY, 503.0, shortest=0.0) == [
        Spell("", 0.0, 0.1),
        Spell("prefill", 0.1, 2.1),
        Spell("decode", 2.1, 502.1),
        Spell("", 502.1, 503.0),
    ]
    told = [spell.phase for spell in spells(HISTORY, 503.0, shortest=0.5)]
    assert told == ["", "prefill", "decode", ""]  # what is before every phase stays
    pauses = (Level(0, "talk", {}), Level(1, "", {}), Level(1.01, "talk", {}))
    assert spells(pauses, 3.0, shortest=0.1) == [Spell("talk", 0, 3.0)]


def test_a_short_phase_is_widened_and_the_axis_says_so() -> None:
    found = spells(HISTORY, 503.0, shortest=0.0)
    axis = TimeAxis(found, 100, 1000, 120)
    widths = [axis.at(spell.stop) - axis.at(spell.start) for spell in found[:-1]]
    assert widths[1] == pytest.approx(120) and not axis.to_scale
    assert 800 < widths[2] < 880
    assert axis.at(0) == 100 and axis.bounds[-1] == pytest.approx(1100)
    assert axis.at(1.1) == pytest.approx(axis.at(0.1) + 60)
    even = TimeAxis([Spell("a", 0, 1), Spell("b", 1, 3)], 0, 900, 120)
    assert even.to_scale and even.at(1) == pytest.approx(300)
    crowd = [Spell(str(i), i, i + 1) for i in range(30)]
    assert TimeAxis(crowd, 0, 900, 120).bounds[-1] == pytest.approx(900)


def test_a_listener_waits_when_sound_comes_late() -> None:
    assert longest_gap([], []) is None
    assert longest_gap([3.0, 3.1, 3.2], [0.5, 0.1, 0.1]) == 0
    # The first ends at 4.0, the second at 5.5; the third comes at 6.25, the last in time.
    assert longest_gap([3.0, 4.5, 6.25, 6.5], [1.0, 1.0, 1.0, 1.0]) == 0.75


def test_speed_is_told_for_each_part() -> None:
    spent = {"decode": 9.0, "talk": 4.0, "vocode": 0.5}
    found = replace(
        report(()), codes=100, audio_seconds=2.0, phase_seconds=spent, longest_gap_s=0.25
    )
    told = found.to_json()
    assert (told["codes_per_s"], told["longest_gap_s"]) == (25.0, 0.25)
    assert told["real_time_factor"] == 2.25 and "; real-time factor 2.25\n" in str(found)
    assert told["audio_per_second"] == {"talk": 0.5, "vocode": 4.0}
    assert str(found).endswith(
        "25.0 codes a second; talk 0.50 s of speech a second; "
        "vocode 4.00 s of speech a second; longest gap 0.25 s"
    )
    silent = report(())
    assert (silent.codes_per_s, silent.audio_per_second) == (None, {})
    assert silent.real_time_factor is None and "factor" not in str(silent)
    assert "gap" not in str(silent)


@pytest.mark.parametrize(
    ("top", "ticks"),
    [(7, [0, 2, 4, 6]), (3 * GIB, [0, 1, 2, 3, 4, 5, 6]), (40 * GIB, [0, 20, 40, 60, 80])],
)
def test_the_scale_of_bytes_is_round(top: int, ticks: list[int]) -> None:
    unit = 1 if top < 100 else GIB // 2
    assert byte_ticks(top) == [tick * unit for tick in ticks]


def pixel(image: Image.Image, holder: str) -> int:
    """How many pixels of the band's colour there are left of the legend."""
    rgb = tuple(int(colour(holder)[i : i + 2], 16) for i in (1, 3, 5))
    part = image.crop((LEFT, 0, WIDTH - LEGEND, HEIGHT))
    return sum(count for count, value in part.getcolors(1 << 24) or () if value == rgb)


def test_the_picture_shows_bytes_times_seconds() -> None:
    image = draw(report(HISTORY))
    assert image.size == (WIDTH, HEIGHT)
    text, kv, made, context = (pixel(image, h) for h in (TEXT, KV, MADE, "context"))
    assert text == pytest.approx(3 * kv, rel=0.08)  # less the name that is written on it
    assert 0 < made < kv / 10  # only in prefill, which is an eighth of the width
    assert context == pytest.approx(kv, rel=0.1)


def test_the_budget_is_drawn_where_it_lies_near() -> None:
    red = (0xB0, 0x00, 0x20)

    def dashes(budget: int) -> int:
        image = draw(report(HISTORY, budget))
        return sum(n for n, value in image.getcolors(1 << 24) or () if value == red)

    assert dashes(8 * GIB) > 1000
    assert dashes(100 * GIB) == 0


def test_a_report_without_history_or_phases_can_be_drawn() -> None:
    assert draw(replace(report(()), phases=())).size == (WIDTH, HEIGHT)


def test_names_fit_beside_their_sizes() -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(17)
    names = [
        *(f"{owner}/{key}" for owner in ("weights", "slabs") for key in ("text", "token2wav")),
        "workspace/de-quantized weights",
        "carry/prompt",
        "slabs/visual",
        "context",
    ]
    for name in names:
        assert 28 + 32 + font.getlength(label(name)) + font.getlength("1023.9 MiB") + 16 < LEGEND
        assert readable_on(colour(name)) in ("black", "white")
    assert len({colour(f"weights/{key}") for key in ("text", "talker", "audio", "visual")}) == 4


def test_each_suffix_has_its_form(tmp_path: Path) -> None:
    found = report(HISTORY)
    for suffix in (".png", ".html", ".json"):
        write_report(found, tmp_path / f"memory{suffix}")
    with Image.open(tmp_path / "memory.png") as image:
        assert (image.format, image.size) == ("PNG", (WIDTH, HEIGHT))
    numbers = json.loads((tmp_path / "memory.json").read_text())
    assert numbers["history"][1]["held"][KV] == GIB
    assert numbers["timeline"][1] == [0.1, "prefill", 5.5 * GIB]
    assert "history" not in found.to_json()
    text = (tmp_path / "memory.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    with Image.open(BytesIO(base64.b64decode(sources[0].split(",")[1]))) as image:
        assert image.size == (WIDTH, HEIGHT)
    assert "<td>decode<td>500.00" in text and json.dumps(numbers["history"][1]["held"]) in text


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.html, \.json"):
        write_report(report(HISTORY), tmp_path / "memory.gif")
    with pytest.raises(UsageError, match="no folder"):
        write_report(report(HISTORY), tmp_path / "none" / "memory.json")
    (tmp_path / "full.json").symlink_to("/dev/full")
    with pytest.raises(LowVRAMError, match="cannot write"):
        write_report(report(HISTORY), tmp_path / "full.json")


ASK = ["-q", "-p", "hi", "--device", "cpu", "--max-tokens", "4", "--max-speech", "1.3"]


def test_run_writes_its_report(tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "memory.json"
    flags = ["-o", str(tmp_path / "x.wav"), "--report", str(target), "--json"]
    assert main(["run", *ASK, *flags]) == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads(target.read_text())
    assert written["measured_peak_bytes"] == printed["report"]["measured_peak_bytes"]
    assert (written["model"], written["device"]) == ("pocket", "cpu")
    by_phase: dict[str, set[str]] = {}
    for level in written["history"]:
        by_phase.setdefault(level["phase"], set()).update(level["held"])
    assert {TEXT, KV, MADE, "carry/prompt"} <= by_phase["prefill"]
    assert {"weights/talker", "weights/token2wav", "kv/talker"} <= by_phase["talk+vocode"]
    parts = printed["report"]["phase_seconds"]
    assert {"prefill", "decode", "talk", "vocode"} <= set(parts) and min(parts.values()) > 0
    rate = printed["report"]["codes"] / parts["talk"]
    assert printed["report"]["codes_per_s"] == pytest.approx(rate)
    assert 0 <= printed["report"]["longest_gap_s"] < printed["report"]["total_s"]
    highest = max(sum(level["held"].values()) for level in written["history"])
    assert highest == written["measured_peak_bytes"]


@pytest.mark.parametrize("name", ["memory.bmp", "none/memory.png", "folder.json"])
def test_a_wrong_name_is_refused_before_the_work(tmp_path: Path, capsys: Any, name: str) -> None:
    (tmp_path / "folder.json").mkdir()
    target = str(tmp_path / name)
    assert main(["run", *ASK, "--report", target]) == UsageError.exit_code
    assert capsys.readouterr().err.startswith(f"lowvram-demo: error: --report {target}: ")


def test_each_turn_of_a_chat_has_its_report(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    lines = iter(["more"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, "/exit"))
    flags = ["--no-speech", "--report", str(tmp_path / "memory.json")]
    assert main(["chat", *ASK, *flags]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory-1.json", "memory-2.json"]
