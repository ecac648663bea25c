"""What every phase of a request shares: the device, the loader, the meter and the plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from lowvram.config import DecoderConfig
from lowvram.models.kv_cache import KVCache
from lowvram.offload import Device, Loader, Meter, Store
from lowvram.planner.plan import Plan
from lowvram.quant import Scratch

M = TypeVar("M", bound=nn.Module)


@dataclass
class Context:
    """One request's view of the device. `dtype` is the compute type of everything but token2wav;
    `scratch` is what packed weights are de-quantized into, and is given back after every phase."""

    device: Device
    store: Store
    loader: Loader
    meter: Meter
    plan: Plan
    dtype: torch.dtype
    scratch: Scratch = field(default_factory=Scratch)

    @contextmanager
    def phase(self, name: str, *, stepwise: bool = False) -> Iterator[None]:
        """Count what follows as that phase, or as the interleaved row of the plan that holds it.

        All computing happens in here; nothing that is yielded to a reader does. `stepwise` is for
        a phase that is entered once a token.
        """
        row = next(row.name for row in self.plan.phases if name in row.name.split("+"))
        with self.meter.phase(row, stepwise=stepwise), torch.inference_mode():
            try:
                yield
            finally:
                self.scratch.free()

    @contextmanager
    def use(self, part: str, kind: type[M]) -> Iterator[M]:
        """That module on the device; it stays there afterwards only if the plan says so."""
        with self.loader.use(part, keep=self.plan.resident(part)) as module:
            assert isinstance(module, kind)
            yield module

    @property
    def host(self) -> torch.device:
        """Where prompts, states and embeddings wait; on `meta` nothing leaves `meta`."""
        return torch.device("meta" if self.device.type == "meta" else "cpu")

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A result of the device, for a later phase."""
        return tensor.to(self.host)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Activations from the host, in the compute type."""
        return tensor.to(self.device.torch, self.dtype)

    @contextmanager
    def carried(self, key: str, *tensors: torch.Tensor) -> Iterator[None]:
        """Count tensors that wait on the host, where host memory is what the budget bounds."""
        if self.device.type == "cpu":
            self.meter.hold("carry", key, sum(t.nbytes for t in tensors), tensors)
        try:
            yield
        finally:
            self.meter.release("carry", key)

    @contextmanager
    def kv_cache(self, key: str, config: DecoderConfig, max_tokens: int) -> Iterator[KVCache]:
        """A KV cache for one sequence of at most `max_tokens`, allocated once, gone at the end."""
        cache = KVCache(
            layers=config.num_hidden_layers,
            batch=1,
            kv_heads=config.num_key_value_heads,
            max_tokens=max_tokens,
            head_dim=config.head_dim,
            dtype=self.dtype,
            device=self.device.torch,
        )
        self.meter.hold("kv", key, cache.nbytes, [cache.data])
        try:
            yield cache
        finally:
            cache.free()
            self.meter.release("kv", key)
