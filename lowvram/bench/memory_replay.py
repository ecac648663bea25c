"""Layers that do the same again take the same memory again, without describing every operation.

On `meta` an operation costs no less time than on a device, since torch describes its result in
Python. A long prompt repeats the same few calls thousands of times: each is run twice in a
phase, and from then on only takes the memory that it took, at its peak and for its result.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from lowvram.offload import Meter, open_device
from lowvram.quant import Scratch

RUNS = 2
"""Calls of a kind that are run in each phase. The least that one of them takes counts: the first
may also make the scratch, which the others find."""

_META = torch.device("meta")


@dataclass
class _Call:
    """One kind of call: how often it was run, what it takes for itself and of the scratch, and how
    to make its result."""

    runs: int = 0
    peak: int = 0
    scratch: int = 0
    result: Callable[[Sequence[Any]], Tensor] | None = None


class Replay:
    """Watches the members of every `nn.ModuleList` of the modules it is given, and the modules of
    `kinds`.

    Calls are of one kind if they are made in the same phase of `meter`, of modules of one class
    with the same numbers and the same parameters' shapes, with tensors of the same shapes. The
    `scratch` of the modules is given back when a phase is left, and is taken again here by a call
    that is not run.
    """

    def __init__(
        self,
        meter: Meter,
        kinds: tuple[type[nn.Module], ...] = (),
        scratch: Scratch | None = None,
    ) -> None:
        self._meter, self._kinds, self._scratch = meter, kinds, scratch or Scratch()
        self._calls: dict[Hashable, _Call] = {}

    def building(self, build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        """`build`, and what it builds watched."""

        def watched() -> nn.Module:
            built = build()
            for part in built.modules():
                members = part if isinstance(part, nn.ModuleList) else ()
                for one in (*members, *((part,) if isinstance(part, self._kinds) else ())):
                    one.forward = self._watching(one, one.forward)
            return built

        return watched

    def restart(self) -> None:
        """Forget all calls: a new request begins."""
        self._calls.clear()

    def _watching(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        kind = _kind(module)

        def call(*args: Any) -> Any:
            key = (len(self._meter.phases), kind, _shapes(args))
            call = self._calls.setdefault(key, _Call())
            if call.scratch:
                self._scratch.take(_META, ((call.scratch,), torch.uint8))
            if call.result is None or call.runs < RUNS:
                before = self._scratch.nbytes
                result = _run(call, forward, args)
                if (after := self._scratch.nbytes) > before:
                    call.scratch = after
                return result
            torch.empty(call.peak, dtype=torch.uint8, device=_META)
            return call.result(args)

        return call


def _run(call: _Call, forward: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    meter = Meter(open_device("meta"))
    with meter.phase("call"):
        out = forward(*args)
    peak = meter.phases[0].peak_bytes
    call.peak = min(call.peak, peak) if call.runs else peak
    call.runs += 1
    call.result = _again(out, args)
    return out


def _again(out: Any, args: Sequence[Any]) -> Callable[[Sequence[Any]], Tensor] | None:
    """How to make such a result: a new tensor, or the argument it is. None for anything else."""
    if not isinstance(out, Tensor):
        return None
    shape, dtype = out.shape, out.dtype
    own = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and _shared(arg, out)]
    if not own:
        return lambda given: torch.empty(shape, dtype=dtype, device=_META)
    return itemgetter(own[0]) if args[own[0]].shape == shape else None


def _shared(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _kind(module: nn.Module) -> Hashable:
    """What sets its work apart from others': not where it stands among its likes."""
    numbers = {
        (type(part), name, value)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str) and name not in ("index", "training")
    }
    shapes = [(name, tensor.shape) for name, tensor in module.named_parameters()]
    return type(module), frozenset(numbers), tuple(shapes)


def _shapes(values: Sequence[Any]) -> Hashable:
    """Shapes of the tensors and the numbers within lists and dataclasses (the windows of the vision
    tower, the frames that wait in the DiT); other arguments say where in the prompt a call
    stands."""
    return tuple(_shape(value) for value in values)


def _shape(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, list | tuple):
        return tuple(v if isinstance(v, int) else _shape(v) for v in value)
    return None
