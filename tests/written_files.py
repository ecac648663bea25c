"""Safetensors files as the package writes them, and made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

DTYPES = [
    *[torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bool],
    *[torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64],
    *[torch.float8_e4m3fn, torch.float8_e5m2],
]


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(7, 13, generator=generator) * 50
    found = {f"of.{str(d).removeprefix('torch.')}": noise.to(d) for d in DTYPES}
    return found | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "cube": torch.arange(24.0).reshape(2, 3, 4),
        "ün.ïcode": torch.ones(1),
    }


def write_sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_raw(folder: Path, header: object, data: bytes = b"", **changes: Any) -> Path:
    """A file with this header; `length` overrides the length it announces."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = changes.get("length", len(text))
    path = folder / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
