"""A decoder layer of one token in one call of the compiled kernels.

Between the products of a layer torch spends a fifth of a decode step on small operations and the
Python that calls them. Here the same is computed in one call (`native/layer.h`), and rounded to
bfloat16 where the operations would round; attention keeps its weights in fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .joined import Joinable
from .kernels import Problem, native
from .linear import QuantLinear
from .plain import LANES, PlainLinear
from .rounded import RoundedLinear


class _Linear(ctypes.Structure):
    """`Linear` of `native/layer.h`."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("pairs", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("form", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    """`Layer` of `native/layer.h`."""

    _fields_ = (
        ("project", _Linear * 3),
        ("mix", _Linear),
        ("open", _Linear * 2),
        ("close", _Linear),
        ("projects", ctypes.c_int64),
        ("opens", ctypes.c_int64),
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("epsilon", ctypes.c_double),
    )


class NativeLayer:
    """The layer, as addresses: its owner keeps the tensors, and lets go of this with them."""

    def __init__(self, layer: _Layer) -> None:
        self._layer, self._address = layer, ctypes.addressof(layer)
        self._call = native.loaded().call

    @staticmethod
    def offered(width: int, inner: int, dim: int) -> bool:
        """Whether layers of that width, whose MLP is `inner` wide and whose heads are `dim` wide,
        are computed so in bfloat16 on this CPU. Builds the library where it may."""
        mlp = Problem("cpu", torch.bfloat16, inner, width, LANES)
        return dim % (2 * LANES) == 0 and native.refusal(mlp) is None

    @classmethod
    def of(
        cls,
        project: Sequence[nn.Module],
        mix: nn.Module,
        open: Sequence[nn.Module],
        close: nn.Module,
        norms: tuple[Tensor, Tensor],
        epsilon: float,
        heads: tuple[int, int, int],
    ) -> NativeLayer | None:
        """The layer of these linears, of those that are `offered`. None where any of them is none
        that the compiled kernels compute with.

        Args:
            project, mix: what makes queries, keys and values, and what takes the heads' outputs.
            open, close: gate and up, and what takes their product.
            norms: weights of the norms before the attention and before the MLP, bfloat16.
            heads: query heads, key heads, and their width.
        """
        projects = [_linear(one) for one in _apart(project)]
        opens = [_linear(one, gates=len(_apart(open)) == 1) for one in _apart(open)]
        found = [*projects, _linear(mix), *opens, _linear(close)]
        linears = [one for one in found if one is not None]
        if len(linears) < len(found) or not all(_is_row(norm) for norm in norms):
            return None
        count = len(projects)
        layer = _Layer(
            project=(_Linear * 3)(*linears[:count]),
            mix=linears[count],
            open=(_Linear * 2)(*linears[count + 1 : -1]),
            close=linears[-1],
            projects=count,
            opens=len(opens),
            attention_norm=norms[0].data_ptr(),
            mlp_norm=norms[1].data_ptr(),
            width=norms[0].numel(),
            heads=heads[0],
            kv_heads=heads[1],
            dim=heads[2],
            epsilon=epsilon,
        )
        return cls(layer)

    def __call__(
        self, x: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, start: int
    ) -> Tensor:
        """bfloat16 [1, 1, H] -> the same. `rope` is [.., head_dim] twice; `keys` and `values` are
        [1, kv_heads, max_tokens, head_dim] and get the row `start`.

        Raises:
            TypeError: something else than rows of bfloat16.
            ValueError: there is no such row.
        """
        for each in (x, *rope, keys, values):
            if each.dtype != torch.bfloat16 or each.stride(-1) != 1:
                raise TypeError(f"{each.dtype} {list(each.shape)}; wanted rows of bfloat16")
        if not 0 <= start < keys.shape[2]:
            raise ValueError(f"row {start} of keys for {keys.shape[2]} tokens")
        out = torch.empty_like(x)
        cos, sin = rope
        self._call(
            "layer",
            self._address,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride(1),
            start,
            out.data_ptr(),
        )
        return out


def _apart(linears: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """Those of several linears of one input that compute: the first alone where they are joined."""
    first = linears[0]
    return linears[:1] if isinstance(first, Joinable) and first.joined else linears


def _linear(linear: nn.Module, *, gates: bool = False) -> _Linear | None:
    """What the library is told of a linear, where it can compute it; packed ones that hold gate and
    up are gated."""
    found: _Found | None = None
    if isinstance(linear, QuantLinear):
        found = _of_file(linear) if linear.stored else _of_four_bits(linear, gates)
    elif isinstance(linear, RoundedLinear):
        found = _of_eight_bits(linear)
    elif isinstance(linear, PlainLinear) and _is_row(linear.weight):
        found = _Found(native.SIXTEEN, len(linear.weight), linear.weight)
    bias = getattr(linear, "bias", None)
    if found is None or not (bias is None or _is_row(bias)):
        return None
    places = (found.weights, found.zeros, found.pairs, bias)
    addresses = [None if each is None else each.data_ptr() for each in places]
    return _Linear(*addresses, linear.in_features, found.outputs, found.group, found.form)


class _Found(NamedTuple):
    """Tensors of a linear, and what the library does with them."""

    form: int
    outputs: int
    weights: Tensor
    pairs: Tensor | None = None
    zeros: Tensor | None = None
    group: int = 1


def _of_four_bits(linear: QuantLinear, gates: bool) -> _Found | None:
    if linear.kernel.name != "native":
        return None
    weights, pairs = linear.get_buffer("packed"), linear.get_buffer("scales_and_zeros")
    form = _kind(pairs) | (native.GATED if gates else 0)
    outputs = weights.shape[0] * native.BLOCK
    return _Found(form, outputs, weights, pairs, group=linear.group_size)


def _of_file(linear: QuantLinear) -> _Found | None:
    if linear.choose_stored("cpu").name != "native":
        return None
    weights, zeros, scales = (linear.get_buffer(name) for name in ("qweight", "qzeros", "scales"))
    if not all(each.is_contiguous() for each in (weights, zeros, scales)):
        return None
    form = _kind(scales) | native.STORED
    return _Found(form, linear.out_features, weights, scales, zeros, linear.group_size)


def _of_eight_bits(linear: RoundedLinear) -> _Found | None:
    if not linear.rounded or linear.product != "native":
        return None
    weights, scales = linear.get_buffer("packed"), linear.get_buffer("scales")
    return _Found(native.EIGHT, len(weights), weights, scales) if _is_row(scales) else None


def _kind(scales: Tensor) -> int:
    return native.FLOAT16 if scales.dtype == torch.float16 else 0


def _is_row(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.is_cpu and tensor.is_contiguous()
