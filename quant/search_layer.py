"""What the search asks about a layer, and what it tells. It knows a decoder layer by its names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lowvram.errors import UsageError

from .packing import GROUPS

Method = Literal["awq", "awq+gptq", "rtn"]

Weights = Mapping[str, Tensor]
"""A layer's tensors by their names inside the layer ("self_attn.q_proj.weight")."""

Forward = Callable[[Weights, int, Tensor], Tensor]
"""Weights, an item's number, and the first t rows of its input [t, H] -> layer output [t, H].

The output includes the residual path. It is computed in the type of the rows, which is float32
where a decision is judged by it. t may be less than the item's length.
"""

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The linears that are packed, in the order in which they are searched."""


class Capture(Protocol):
    """The arguments of a `Forward` -> the input [t, K] of each linear of `LINEARS`, by its name.

    No linear after `last` is asked for: the layer need not be computed beyond the input of that.
    """

    def __call__(
        self, weights: Weights, index: int, x: Tensor, /, last: str = ...
    ) -> Mapping[str, Tensor]: ...


class LayerInputs(Protocol):
    """Calibration items: what goes into the layer, [T_i, H] each, read when asked for.

    `held_out` items are used for judging only. When it names none, the last item is held out, or,
    where there is only one, used for both.
    """

    @property
    def held_out(self) -> frozenset[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Geometry:
    """Attention heads: query heads, key/value heads, and channels of each."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How a layer is packed.

    Args:
        bits: 4.
        group_size: inputs that share a step: 32, 64 or 128.
        method: "awq" searches scales and ranges; "awq+gptq" then rounds so that errors make up for
            each other; "rtn" rounds to the nearest on the full range.
        grid: scale candidates tried per group of linears, besides the identity.
        clip: search the ends of each group's range.
        search_tokens: calibration tokens kept for the scale search; means and products of inputs
            are taken over all tokens.
        judge_tokens: held-out tokens a decision is judged by.
        seed: which tokens are kept.
        dtype: of the norms and biases that are written; packed steps are float16.
    """

    bits: int = 4
    group_size: int = 128
    method: Method = "awq"
    grid: int = 20
    clip: bool = True
    search_tokens: int = 2048
    judge_tokens: int = 512
    seed: int = 0
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise UsageError(f"{self.bits} bits cannot be packed; wanted 4")
        if self.group_size not in GROUPS:
            wanted = ", ".join(map(str, GROUPS))
            raise UsageError(f"group size {self.group_size} is not supported; wanted {wanted}")
        if self.method not in get_args(Method):
            raise UsageError(
                f"unknown method {self.method!r}; wanted {', '.join(get_args(Method))}"
            )


@dataclass(frozen=True)
class LinearReport:
    """One linear. Errors are shares of its output's energy on held-out tokens, each judged with
    the inputs of the 16-bit layer; without inputs, shares of the weights' energy.

    `clipped` is the share of weights that lie outside the range they were given.
    """

    linear: str
    rtn_error: float
    awq_error: float
    clipped: float

    @property
    def ratio(self) -> float:
        """`awq_error` as a share of `rtn_error`; 1 where both are 0."""
        return self.awq_error / self.rtn_error if self.rtn_error else 1.0


@dataclass(frozen=True)
class Step:
    """One decision: a group of linears ("qkv", "o", "gate-up", "down"), what was tried, the
    layer's held-out error before and with it, and whether it was kept."""

    group: str
    tried: str
    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class LayerResult:
    """A packed layer.

    `tensors`: everything the file holds of it, by name inside the layer, on the CPU. `error_before`
    and `error_after`: rounding to nearest, and this result: energy of the change of the layer's
    output on held-out tokens as a share of the energy of what the layer adds. Both are None when
    there are no inputs.
    """

    tensors: dict[str, Tensor]
    reports: tuple[LinearReport, ...]
    steps: tuple[Step, ...]
    error_before: float | None
    error_after: float | None
    seconds: float
