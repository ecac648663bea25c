"""A part whose layers and head pieces can be streamed, and a checkpoint that holds it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowvram.offload import (
    Device,
    Loader,
    Meter,
    Part,
    Placement,
    Store,
    UnitStream,
    blob_bytes,
    open_device,
)

WIDTH, HEAD_ROWS, PIECE_ROWS = 16, 20, 8
LAYERS = 5


class Layer(nn.Module):
    """Layers differ in size, and hold a type of their own besides the part's."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, inner)
        self.down = nn.Linear(inner, WIDTH, bias=False)
        self.register_buffer("shift", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.zeros(WIDTH))
        self.stored_dtypes = {"scale": torch.float16}
        self.prepared = 0

    def after_load(self) -> None:
        self.prepared += 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.tanh(self.up(x))) * self.get_buffer("scale").to(x.dtype)
        return x + y + self.get_buffer("shift")


class Piece(nn.Module):
    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.stored_rows = ("head.weight", start, stop)
        self.weight = nn.Parameter(torch.empty(stop - start, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Stack(nn.Module):
    """`layers` layers, a norm that always stays, and a head in row pieces."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(inner_width(i)) for i in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.pieces = nn.ModuleList(
            Piece(start, min(start + PIECE_ROWS, HEAD_ROWS))
            for start in range(0, HEAD_ROWS, PIECE_ROWS)
        )


def inner_width(layer: int) -> int:
    return 8 + 4 * (layer % 3)


def stack_units(module: nn.Module) -> Sequence[nn.Module]:
    assert isinstance(module, Stack)
    return [*module.layers, *module.pieces]


def stack_part(
    layers: int,
    dtype: torch.dtype = torch.float32,
    units: Callable[..., Sequence[nn.Module]] = stack_units,
) -> Part:
    return Part("stack", "m.", lambda: Stack(layers), dtype, units)


def write_stack(folder: Path, layers: int, dtype: torch.dtype = torch.float32) -> None:
    """Random weights of that type (`scale` float16 all the same) in two shards' worth of order."""
    generator = torch.Generator().manual_seed(5)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors: dict[str, Tensor] = {}
    for i in range(layers):
        inner, name = inner_width(i), f"m.layers.{i}"
        tensors |= {
            f"{name}.up.weight": some(inner, WIDTH).to(dtype),
            f"{name}.up.bias": some(inner).to(dtype),
            f"{name}.down.weight": some(WIDTH, inner).to(dtype),
            f"{name}.shift": torch.tensor(i % 2),
            f"{name}.scale": (some(WIDTH) / 4).to(torch.float16),
        }
    tensors |= {
        "m.norm.weight": some(WIDTH).to(dtype),
        "m.norm.bias": some(WIDTH).to(dtype),
        "m.head.weight": some(HEAD_ROWS, WIDTH).to(dtype),
    }
    save_file(tensors, folder / "model.safetensors")


def unit_bytes(layers: int, unit: int, itemsize: int = 4) -> int:
    """Of one unit as a blob."""
    if unit < layers:
        inner = inner_width(unit)
        product = inner * WIDTH * itemsize
        return blob_bytes([product, inner * itemsize, product, 8, 2 * WIDTH])
    start = (unit - layers) * PIECE_ROWS
    return blob_bytes([(min(start + PIECE_ROWS, HEAD_ROWS) - start) * WIDTH * itemsize])


def streaming(layers: int, *streamed: int, slabs: int = 2, **changes: object) -> Placement:
    """A placement with slabs as large as they must be for fp32."""
    largest = max(unit_bytes(layers, unit) for unit in streamed)
    return Placement(streamed=streamed, slabs=slabs, slab_bytes=largest, **changes)  # type: ignore[arg-type]


def loader_of(
    store: Store | None, device: Device, layers: int, dtype: torch.dtype = torch.float32
) -> tuple[Loader, Meter]:
    meter = Meter(device)
    return Loader(store, device, meter, [stack_part(layers, dtype)]), meter


def one_pass(module: nn.Module, stream: UnitStream, x: Tensor) -> Tensor:
    """x [n, WIDTH] through every unit in order -> [n, HEAD_ROWS]."""
    assert isinstance(module, Stack)
    layers = len(module.layers)
    for index in range(layers):
        with stream.unit(index) as layer:
            x = layer(x)
    x = module.norm(x)
    scores = []
    for index in range(layers, layers + len(module.pieces)):
        with stream.unit(index) as piece:
            scores.append(piece(x))
    return torch.cat(scores, dim=-1)


def on_cpu(store: Store) -> tuple[Loader, Meter]:
    return loader_of(store, open_device("cpu"), LAYERS)


def resident_result(store: Store, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of the same pass with everything on the CPU."""
    loader, _ = loader_of(store, open_device("cpu"), LAYERS, dtype)
    return one_pass(loader.load("stack"), loader.stream("stack"), x)


def readers() -> list[threading.Thread]:
    """Threads that read ahead."""
    return [t for t in threading.enumerate() if t.name.startswith("lowvram-reader")]
