"""Files written here, read back by the `safetensors` library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowvram.offload import Store
from lowvram.quantize.shards import PIECE_BYTES, Entry, copied, cut, write_shard

TENSORS: dict[str, tuple[str, Tensor]] = {
    "layers.0.qweight": ("I32", torch.arange(-12, 12, dtype=torch.int32).view(4, 6)),
    "layers.0.scales": ("F16", torch.randn(3, 5).half()),
    "layers.0.norm": ("BF16", torch.randn(7).bfloat16()),
    "naïve.größe": ("F32", torch.randn(2, 3, 4)),
    "counts": ("I64", torch.tensor(2**40)),
    "flags": ("BOOL", torch.tensor([True, False, True])),
    "bytes": ("U8", torch.arange(5, dtype=torch.uint8)),
    "none": ("F32", torch.empty(0, 4)),
}


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def entry(name: str) -> Entry:
    """A tensor that comes in pieces of unequal sizes."""
    dtype, tensor = TENSORS[name]
    data = raw(tensor)

    def pieces() -> Iterator[bytes]:
        yield data[:3]
        yield data[3:]

    return Entry(name, dtype, tuple(tensor.shape), len(data), pieces)


def test_names_types_shapes_bytes_and_metadata_come_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, [entry(name) for name in TENSORS])
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(TENSORS)
        for name, (dtype, tensor) in TENSORS.items():
            assert file.get_slice(name).get_dtype() == dtype
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
            assert raw(found) == raw(tensor), name


def test_tensors_of_the_library_s_own_file_are_copied_as_they_are(tmp_path: Path) -> None:
    large = torch.randn(PIECE_BYTES // 4 + 3)
    tensors = {"large": large, **{name: tensor for name, (_, tensor) in TENSORS.items()}}
    save_file(tensors, tmp_path / "source.safetensors", {"format": "pt"})
    with Store(tmp_path, [tmp_path / "source.safetensors"]) as store:
        entries = [copied(store, store.info(name)) for name in store.names()]
        write_shard(tmp_path / "copy.safetensors", entries)
    with safe_open(tmp_path / "copy.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert raw(file.get_tensor(name)) == raw(tensor), name


def test_the_library_refuses_a_file_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, [entry("layers.0.scales")])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass


@pytest.mark.parametrize("most", [40, 10_000])
def test_shards_hold_every_tensor_once(tmp_path: Path, most: int) -> None:
    shards = cut([entry(name) for name in TENSORS], most)
    assert (len(shards) == 1) == (most == 10_000)
    seen: list[str] = []
    for number, shard in enumerate(shards):
        write_shard(tmp_path / f"{number}.safetensors", shard)
        with safe_open(tmp_path / f"{number}.safetensors", "pt") as file:
            seen += file.keys()
    assert sorted(seen) == sorted(TENSORS)


def test_the_index_of_a_result_is_what_its_files_hold(
    source: Path, quantize: Callable[..., Any], tmp_path: Path
) -> None:
    result = tmp_path / "result"
    quantize(source, result, method="rtn", calibration="none", shard_bytes=1_000_000)
    index = json.loads((result / "model.safetensors.index.json").read_text())
    where: dict[str, str] = {}
    total = 0
    for path in sorted(result.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                assert name not in where
                where[name] = path.name
                total += file.get_tensor(name).nbytes
    assert len(set(where.values())) > 3
    assert index == {"metadata": {"total_size": total}, "weight_map": where}
