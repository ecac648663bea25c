"""A module of one packed and a few plain layers, and a checkpoint that holds it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowvram.offload import Loader, Meter, Part, Store, open_device

K, N = 48, 32


class Packed(nn.Module):
    """A linear with integer codes and 16-bit scales, whose layout is derived after each load."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.empty(K, N, dtype=torch.int32))
        self.register_buffer("scales", torch.empty(N))
        self.stored_dtypes = {"scales": torch.float16}
        self.loads = 0

    def after_load(self) -> None:
        self.loads += 1
        ready = self.get_buffer("codes").to(torch.int8)
        del self.codes
        self.register_buffer("ready", ready, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.get_buffer("ready").to(x.dtype) * self.get_buffer("scales").to(x.dtype)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(N, K), nn.LayerNorm(K), Packed())
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
        self.extra = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.extra + self.get_buffer("steps").sum()


def toy_tensors() -> dict[str, Tensor]:
    torch.manual_seed(1)
    linear, norm = nn.Linear(N, K), nn.LayerNorm(K)
    return {
        "a.inner.0.weight": linear.weight.detach().to(torch.bfloat16),
        "a.inner.0.bias": linear.bias.detach(),
        "a.inner.1.weight": norm.weight.detach(),
        "a.inner.1.bias": norm.bias.detach(),
        "a.inner.2.codes": torch.randint(-8, 8, (K, N), dtype=torch.int32),
        "a.inner.2.scales": torch.rand(N).to(torch.bfloat16),
        "a.steps": torch.arange(3),
        "a.extra": torch.tensor(0.5),
        "b.weight": torch.randn(5, 4),
        "b.bias": torch.randn(5),
    }


AS_LOADED = 4 * (N * K + K + K + K + 1) + 4 * K * N + 2 * N + 8 * 3
AS_PREPARED = AS_LOADED - 3 * K * N  # codes are one byte then
B_BYTES = 4 * (5 * 4 + 5)

PARTS = (
    Part("toy", "a.", Toy, torch.float32),
    Part("small", "b.", lambda: nn.Linear(4, 5), torch.float32),
)


def loader_on(store: Store | None, name: str = "cpu") -> tuple[Loader, Meter]:
    device = open_device(name)
    meter = Meter(device)
    return Loader(store, device, meter, PARTS), meter


def reference(x: Tensor) -> Tensor:
    t = toy_tensors()
    y = nn.functional.linear(x, t["a.inner.0.weight"].float(), t["a.inner.0.bias"])
    y = nn.functional.layer_norm(y, (K,), t["a.inner.1.weight"], t["a.inner.1.bias"])
    scales = t["a.inner.2.scales"].to(torch.float16).float()
    return y @ t["a.inner.2.codes"].float() * scales + 0.5 + 3


class Grown(nn.Module):
    """Fails after its tensors were filled."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 4))

    def after_load(self) -> None:
        raise torch.OutOfMemoryError("no room for a second layout")
