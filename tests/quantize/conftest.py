"""A checkpoint of two layers, and settings with which it is quantized in a moment."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowvram.pocket import make_checkpoint, pocket_config
from lowvram.quantize import QuantizeReport, QuantizeSettings, quantize_checkpoint

QUICK: dict[str, Any] = {"device": "cpu", "samples": 4, "seq_len": 96}

Quantize = Callable[..., QuantizeReport]


def small_config(**text: Any) -> dict[str, Any]:
    """The built-in model's `config.json` with two layers, fields of the text model replaced."""
    config = copy.deepcopy(pocket_config())
    config["thinker_config"]["text_config"] |= {"num_hidden_layers": 2, **text}
    return config


@pytest.fixture(scope="session")
def small() -> Callable[..., dict[str, Any]]:
    return small_config


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint with speech."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return make_checkpoint(folder, config=small_config(), shards=2)


@pytest.fixture(scope="session")
def quantize() -> Quantize:
    """`quantize_checkpoint` with quick settings: `quantize(model, destination, method=...)`."""

    def run(model: Path, destination: Path, **options: Any) -> QuantizeReport:
        names = set(QuantizeSettings.__dataclass_fields__)
        chosen = QUICK | {key: options.pop(key) for key in names & options.keys()}
        return quantize_checkpoint(model, destination, QuantizeSettings(**chosen), **options)

    return run


@pytest.fixture(scope="session")
def whole(source: Path, quantize: Quantize, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source, quantized by search without an interruption."""
    destination = tmp_path_factory.mktemp("whole") / "result"
    quantize(source, destination)
    return destination


@pytest.fixture(scope="session")
def rounded(source: Path, quantize: Quantize, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source, rounded without calibration and without an interruption."""
    destination = tmp_path_factory.mktemp("rounded") / "result"
    quantize(source, destination, method="rtn", calibration="none")
    return destination


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, by its path in the folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def read() -> Callable[[Path], dict[str, bytes]]:
    return contents
