"""Stores that tests read: the toy part's tensors, the streamed part's, and one of every type."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file
from streamed_part import LAYERS, write_stack
from toy_part import toy_tensors
from written_files import some_tensors

from lowvram.offload import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    save_file(toy_tensors(), tmp_path / "model.safetensors")
    with Store.open(tmp_path) as opened:
        yield opened


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(some_tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Store]:
    write_stack(tmp_path, LAYERS)
    with Store.open(tmp_path) as opened:
        yield opened
