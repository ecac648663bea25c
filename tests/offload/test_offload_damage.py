"""Files of any damage: refused exactly where the safetensors package refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from written_files import write_raw

from lowvram.errors import CheckpointError
from lowvram.offload import Store

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
LOOSE = settings(
    deadline=None,
    derandomize=True,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def read_all(folder: Path) -> dict[str, torch.Tensor] | None:
    """Every tensor our reader gives, or None if it refuses the file."""
    try:
        with Store.open(folder) as store:
            return {name: store.read(name) for name in store.names()}
    except CheckpointError:
        return None


def oracle(path: Path) -> dict[str, torch.Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def same(ours: dict[str, torch.Tensor] | None, theirs: dict[str, torch.Tensor] | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours.keys() == theirs.keys() and all(
        ours[n].dtype == theirs[n].dtype
        and ours[n].shape == theirs[n].shape
        and ours[n].numpy().tobytes() == theirs[n].numpy().tobytes()
        for n in ours
    )


@LOOSE
@given(data=st.data())
def test_damaged_files_are_refused_exactly_where_the_safetensors_package_refuses(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(3), "b": torch.tensor([[1.5]]), "c": torch.zeros(0)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw))) or None])
    ours, theirs = read_all(tmp_path), oracle(path)
    assert same(ours, theirs)


@LOOSE
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), VALUES))
def test_a_header_of_anything_is_refused_or_read(tmp_path: Path, header: dict[str, Any]) -> None:
    write_raw(tmp_path, json.dumps(header).encode(), b"")
    read_all(tmp_path)


FIELD = st.integers(-2, 20) | VALUES


@LOOSE
@given(
    dtype=st.sampled_from(["F32", "U8", "F4", ""]) | VALUES,
    shape=st.lists(FIELD, max_size=3) | VALUES,
    offsets=st.lists(FIELD, max_size=3) | VALUES,
    size=st.integers(0, 20),
)
def test_an_entry_of_anything_is_refused_or_read(
    tmp_path: Path, dtype: object, shape: object, offsets: object, size: int
) -> None:
    write_raw(
        tmp_path, {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, b"x" * size
    )
    found = read_all(tmp_path)
    assert found is None or sum(t.nbytes for t in found.values()) == size
