"""What a module is to the loader: how it is built, where its tensors lie, what of it can stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn


def no_units(module: nn.Module) -> Sequence[nn.Module]:
    """The units of a part that is only ever on the device as a whole."""
    return ()


@dataclass(frozen=True)
class Part:
    """A module that is loaded and dropped as one.

    `build` makes it with parameters named as in the checkpoint after `prefix`; it is called once,
    on the meta device. Floating-point tensors get `dtype`, unless a submodule pins one of its own
    with `stored_dtypes: dict[str, torch.dtype]` (by its parameter's or buffer's name). Integers
    keep the type they were built with. After each load `after_load()` of every submodule that has
    one runs; tensors it makes must be parameters or buffers, which a drop undoes, and tells every
    submodule that has `as_built()`. One whose `keeps_stored(device_type)` is true promises that
    what was loaded stays in place there.

    A submodule with `stored_rows = (name, first, stop)` has for its `weight` those rows of the
    part's stored tensor of that name. One with `fills = "weight"` gets no memory for the parameter
    of that name: `fill_from(rows, device)` makes what it wants of it, where `rows(start, stop)`
    reads stored rows in the type the parameter would have.

    `units` names submodules, none inside another, in the order they run: each can be streamed by
    itself while the rest of the part stays on the device. A unit that streams is used as stored:
    there is no `after_load()` for it.
    """

    name: str
    prefix: str
    build: Callable[[], nn.Module]
    dtype: torch.dtype
    units: Callable[[nn.Module], Sequence[nn.Module]] = no_units
