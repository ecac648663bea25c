"""What every phase of a request shares: the device, the loader, the meter and the plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import nn

from lowvram.config import DecoderConfig
from lowvram.engine.host_kv import HostKVCache
from lowvram.engine.ladder import Ladder
from lowvram.models.constants import Constants
from lowvram.models.kv_cache import KVCache
from lowvram.models.kv_rounded import RoundedKVCache
from lowvram.offload import Device, Loader, Meter, Placement, Store, UnitStream
from lowvram.planner import Plan
from lowvram.planner.streaming import spread
from lowvram.quant import Scratch

M = TypeVar("M", bound=nn.Module)

SLABS = 2
"""Units of a streamed part on the device at a time: one in use, one on its way."""


@dataclass
class Context:
    """One request's view of the device. `dtype` is the compute type of everything but token2wav;
    `scratch` is what packed weights are de-quantized into, and is given back after every phase.

    `constants` are what the vocoder of any request needs and one of them has made.
    `placements` begin as the plan's, and `notes` empty; both change where memory runs out all the
    same (see `engine/ladder.py`). `phase_seconds` counts each phase by its own name; `recorded`
    has what forgets the recorded step of a part; `option_errors` what each option in effect costs,
    see `Report`.
    """

    device: Device
    store: Store
    loader: Loader
    meter: Meter
    plan: Plan
    dtype: torch.dtype
    scratch: Scratch = field(default_factory=Scratch)
    constants: Constants = field(default_factory=Constants)
    placements: dict[str, Placement] = field(init=False)
    notes: list[str] = field(default_factory=list)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    recorded: dict[str, Callable[[], None]] = field(default_factory=dict)
    option_errors: dict[str, float] = field(default_factory=dict)
    _using: set[str] = field(default_factory=set)
    _row: str = ""

    def __post_init__(self) -> None:
        self.placements = dict(self.plan.placements)

    @contextmanager
    def phase(self, name: str, *, stepwise: bool = False) -> Iterator[None]:
        """Count what follows as that phase, or as the interleaved row of the plan that holds it.

        All computing happens in here; nothing that is yielded to a reader does. `stepwise` is for
        a phase that is entered once a token.
        """
        row = next(row.name for row in self.plan.phases if name in row.name.split("+"))
        if row != self._row:
            self._row = row
            if self.device.type not in ("cpu", "meta"):
                # What the last row's activations were in is not this one's to hold.
                self.device.empty_cache()
        started = time.perf_counter()
        with self._current(), self.meter.phase(row, stepwise=stepwise), torch.inference_mode():
            try:
                yield
            finally:
                self.scratch.free()
                spent = time.perf_counter() - started
                self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + spent

    def _current(self) -> AbstractContextManager[object]:
        """Has the device be the current one, which every thread has of its own: libraries ask that
        one what it can do."""
        cuda = self.device.type == "cuda"
        return torch.cuda.device(self.device.torch) if cuda else nullcontext()

    @contextmanager
    def use(self, part: str, kind: type[M]) -> Iterator[M]:
        """That module on the device; it stays there afterwards only if the plan says so."""
        self._using.add(part)
        try:
            module = Ladder(self, part).climb(lambda: self.load(part))
            assert isinstance(module, kind)
            self._look_ahead(part)
            yield module
        finally:
            self._using.discard(part)
            if (forget := self.recorded.get(part)) is not None:
                forget()
            if part in self.placements or not self.plan.resident(part):
                self.loader.drop(part)

    def _look_ahead(self, part: str) -> None:
        """Have what the next phase loads read from the disk while this one computes."""
        rows = self.plan.phases
        first = next(i for i, row in enumerate(rows) if part in row.modules)
        later = ([m for m in row.modules if m not in rows[first].modules] for row in rows[first:])
        for name in next(filter(None, later), ()):
            if not self.loader.is_resident(name):
                self.loader.expect(name)

    def load(self, part: str) -> nn.Module:
        """The part in its present placement; nothing is done if it is there."""
        return self.loader.load(part, self.placements.get(part))

    def stream(self, part: str) -> UnitStream:
        """How the units of a part in use come to the device."""
        return self.loader.stream(part)

    def idle(self) -> list[str]:
        """Parts on the device that no phase under way uses."""
        return [name for name in self.loader.resident() if name not in self._using]

    def stream_more(self, part: str) -> Placement | None:
        """Place the part with fewer units that stay, to be loaded anew; None where no fewer bytes
        would, or it cannot stream."""
        if not self.loader.streams(part):
            return None
        sizes = self.loader.unit_bytes(part)
        now = self.placements.get(part)
        # The first units that stream only pay for the slabs that they stream through.
        count = len(now.streamed) + 1 if now else SLABS + 1
        if count > len(sizes):
            return None
        streamed = spread(count, len(sizes))
        slab_bytes = max(sizes[i] for i in streamed)
        if now is not None:
            wider = replace(now, streamed=streamed, slab_bytes=slab_bytes)
        else:
            source: Literal["file", "ring"] = "file" if self.device.type == "cpu" else "ring"
            wider = Placement(streamed=streamed, slabs=SLABS, slab_bytes=slab_bytes, source=source)
        self.placements[part] = wider
        self.loader.drop(part)
        return wider

    def note(self, text: str) -> None:
        """Say in the report that something was done otherwise than planned."""
        self.notes.append(text)

    @property
    def host(self) -> torch.device:
        """Where prompts, states and embeddings wait."""
        return torch.device("cpu")

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A result of the device, for a later phase. `meta` has only its shape to give."""
        if tensor.is_meta:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.host)
        return tensor.to(self.host)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Activations from the host, in the compute type."""
        return tensor.to(self.device.torch, self.dtype)

    @contextmanager
    def carried(self, key: str, *tensors: torch.Tensor) -> Iterator[None]:
        """Count tensors that wait on the host, where host memory is what the budget bounds."""
        self.carry(key, *tensors)
        try:
            yield
        finally:
            self.let_go(key)

    def carry(self, key: str, *tensors: torch.Tensor) -> None:
        """The same until `let_go`, in the place of what was carried under that key."""
        if self.device.type == "cpu":
            self.meter.hold("carry", key, sum(t.nbytes for t in tensors), tensors)

    def let_go(self, key: str) -> None:
        """What was carried under that key is gone, if anything was."""
        self.meter.release("carry", key)

    @contextmanager
    def kv_cache(
        self, key: str, part: str, config: DecoderConfig, max_tokens: int
    ) -> Iterator[KVCache | HostKVCache]:
        """A KV cache for one sequence of at most `max_tokens` through `part`, allocated once, gone
        at the end; on the host where the plan says so."""

        def make() -> KVCache | HostKVCache:
            shape = {
                "layers": config.num_hidden_layers,
                "batch": 1,
                "kv_heads": config.num_key_value_heads,
                "max_tokens": max_tokens,
                "head_dim": config.head_dim,
            }
            kind = RoundedKVCache if "kv8" in self.plan.used else KVCache
            if self.plan.kv.get(key) == "host":
                return HostKVCache(self.device, **shape, dtype=self.dtype, kind=kind)
            return kind(**shape, dtype=self.dtype, device=self.device.torch)

        cache = Ladder(self, part).climb(make)
        self.meter.hold("kv", key, cache.nbytes, cache.tensors)
        try:
            yield cache
            if (error := cache.error) is not None:
                self.option_errors["kv8"] = max(error, self.option_errors.get("kv8", 0.0))
        finally:
            cache.free()
            self.meter.release("kv", key)
