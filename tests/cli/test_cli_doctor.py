"""`doctor`: packages in and out of range, devices, and checkpoints that are not what they say."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from lowvram.cli import doctor
from lowvram.cli.doctor import Package, examine, in_range, requirements
from lowvram.cli.main import main


@pytest.mark.parametrize(
    ("version", "wanted", "good"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.11", ">=2.11.0", True),
        ("2.9.1", ">=2.11", False),
        ("5.23.0", ">=5.17,<6", True),
        ("5.16.3", ">=5.17,<6", False),
        ("6.0.0", ">=5.17,<6", False),
        ("0.2.9", "==0.2.9", True),
        ("0.2.8", "==0.2.9", False),
        ("2.11.0rc1", ">=2.11", True),
        ("1.0", "", True),
    ],
)
def test_ranges(version: str, wanted: str, good: bool) -> None:
    assert in_range(version, wanted) is good


def test_requirements_are_those_of_the_package_without_its_extras() -> None:
    found = dict(requirements())
    assert found["transformers"].split(",") in (["<6", ">=5.17"], [">=5.17", "<6"])
    assert {"torch", "av", "soundfile", "psutil", "tokenizers"} <= found.keys()
    assert not {"pytest", "torch-npu", "autoawq"} & found.keys()


def test_a_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError(f"lib{name}.so is missing")

    monkeypatch.setattr(doctor, "import_module", broken)
    found = examine("soundfile", ">=0.12")
    assert found.problem == "is installed and does not load (libsoundfile.so is missing)"
    assert examine("numpy", ">=1").problem is None


def test_the_page_names_devices_packages_and_the_model(capsys: Any) -> None:
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"lowvram-omni {metadata.version('lowvram-omni')}, Python 3.")
    assert "\n  cpu " in out
    assert f"\n  torch            {metadata.version('torch'):14} >=2.11\n" in out
    assert "voices: Chelsie, Ethan" in out
    assert err == ""


def test_the_same_as_json(capsys: Any) -> None:
    assert main(["doctor", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert state["model"]["differences"] == []
    assert state["model"]["voices"] == ["Chelsie", "Ethan"]
    assert state["devices"][-1]["name"] == "cpu"
    assert 0 < state["devices"][-1]["free_bytes"] <= state["devices"][-1]["total_bytes"]
    assert state["default_device"] in ("cpu", "cuda", "npu")
    assert all(package["problem"] is None for package in state["packages"])


def test_what_is_missing_is_said_with_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    missing = Package("soxr", None, ">=0.5", "is not installed")
    monkeypatch.setattr(doctor, "examine", lambda name, wanted: missing)
    monkeypatch.setattr(doctor, "requirements", lambda: [("soxr", ">=0.5")])
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "  soxr             -              >=0.5  <- is not installed\n" in out
    said = "soxr is not installed: pip install --upgrade 'soxr>=0.5'"
    assert err == f"lowvram-demo: error: {said}\n"


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, capsys: Any) -> None:
    assert main(["doctor", "-m", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "packages" in out
    assert err.startswith("lowvram-demo: error: ")
    assert err.count("\n") == 1


def test_differences_are_listed(tmp_path: Path, capsys: Any) -> None:
    from lowvram.pocket import make_checkpoint

    folder = tmp_path / "model"
    make_checkpoint(folder, seed=3)
    config = json.loads((folder / "config.json").read_text())
    text = config["thinker_config"]["text_config"]
    text["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["doctor", "-m", str(folder)]) == 1
    out, err = capsys.readouterr()
    layer = text["num_hidden_layers"] - 1
    assert f"thinker.model.layers.{layer}.self_attn.q_proj.weight" in out
    assert "differ from what its config.json asks for in 12 places that matter" in err
    assert main(["doctor", "-m", str(folder), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["model"]["differences"]) == 12
