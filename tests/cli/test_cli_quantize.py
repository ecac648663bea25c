"""`quantize-checkpoint` as it is typed: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowvram.cli import quantize as command
from lowvram.cli.quantize import main
from lowvram.pocket import make_checkpoint

QUICK = ["--calibration", "none", "--method", "rtn", "--device", "cpu"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", speech=False)


def test_a_dry_run_tells_sizes_and_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(model), str(tmp_path / "result"), "--dry-run"]) == 0
    told = capsys.readouterr()
    for line in ("quantized: 28 linears in 4 decoder layers", "copied as it is:", "memory:"):
        assert line in told.out
    assert "disk:" in told.out and "time: about" in told.out and not told.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_dry_run_foretells_the_size_and_needs_no_torch(model: Path, tmp_path: Path) -> None:
    argv = [str(model), str(tmp_path / "result"), *QUICK, "--json"]
    code = (
        "import sys\nfrom lowvram.cli.quantize import main\n"
        f"assert main({[*argv, '--dry-run']}) == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    plan = json.loads(done.stdout)
    assert main(argv) == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "result").iterdir()}
    ours = sum(sizes[name] for name in sizes if name.startswith(("quantization", "config")))
    headers = sum(sizes.values()) - ours - plan["result_bytes"]
    assert 0 < headers < 60_000, "what the plan leaves out are headers and the index"


def test_json_goes_to_stdout_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(model), str(tmp_path / "result"), *QUICK, "--json", "--verify"]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert [layer["layer"] for layer in report["layers"]] == [0, 1, 2, 3]
    assert 0 < report["verification"]["agreement"] <= 1
    assert report["destination"] == str(tmp_path / "result")


def test_a_table_of_layers_for_people(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(model), str(tmp_path / "result"), *QUICK]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[0].split() == [
        *("layer", "rounded", "result", "seconds", "worst", "linear")
    ]
    assert len(told.out.splitlines()) == 6
    summary = told.out.splitlines()[-1]
    assert re.fullmatch(r"rtn: mean error 0\.\d+ -> 0\.\d+, [\d.e-]+ s a layer", summary)
    assert "\r" not in told.err, "a bar is for terminals"
    assert main([str(model), str(tmp_path / "result"), *QUICK, "--resume", "-v"]) == 0
    more = capsys.readouterr().out
    assert more.count("mlp.down_proj") >= 4
    assert more.endswith(f"\n{summary[: summary.rindex(',')]}\n")
    first, again = (
        [line.split() for line in said.splitlines()[-5:-1]] for said in (told.out, more)
    )
    assert all(float(row.pop(3)) > 0 for row in first)
    assert [row.pop(3) for row in again] == ["-"] * 4 and first == again


@pytest.mark.parametrize(
    ("flags", "code", "match"),
    [
        (["--bits", "3"], 2, "--bits 3 is not made; wanted 4"),
        (["--method", "magic"], 2, "'awq', 'awq+gptq', 'rtn'"),
        (["--method", "awq+gptq", "--calibration", "none"], 2, "wanted --calibration other than"),
        (["--device", "abacus"], 2, "abacus"),
        (["--max-memory", "much"], 2, "much"),
        (["--max-memory", "1MiB"], 3, "wanted at least"),
        (["--calibration", "nowhere"], 2, "nowhere"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_each_failure_is_one_line_and_a_code(
    flags: list[str],
    code: int,
    match: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(model), str(tmp_path / "result"), *flags]) == code
    told = capsys.readouterr().err
    assert told.startswith("quantize-checkpoint: error: ") and match in told
    assert told.count("\n") == 1
    assert not (tmp_path / "result").exists()


def test_a_source_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), str(tmp_path / "result"), "--offline"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_interrupted_it_says_how_to_go_on(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(self: Any, at: Any) -> None:
        if at.stage == "layer":
            raise KeyboardInterrupt

    argv = [str(model), str(tmp_path / "result"), *QUICK]
    with monkeypatch.context() as patched:
        patched.setattr(command._Bar, "show", stop)
        assert main(argv) == 130
    assert "go on with --resume" in capsys.readouterr().err
    assert main(argv) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0


def test_on_a_terminal_a_bar_tells_layer_error_and_time(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    argv = [str(model), str(tmp_path / "result"), "--samples", "2", "--seq-len", "32"]
    assert main([*argv, "--device", "cpu"]) == 0
    told = capsys.readouterr().err
    assert "4/4 layers" in told and "error 0.0" in told and "left" in told
