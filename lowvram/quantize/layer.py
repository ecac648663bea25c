"""One decoder layer: read from the file, run with any weights, its linears' inputs looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowvram.config import DecoderConfig
from lowvram.models.kv_cache import KVCache
from lowvram.models.linear import dense
from lowvram.models.rope import mrope
from lowvram.models.text import DecoderLayer
from lowvram.offload import Store
from lowvram.quant import dense_layer
from lowvram.quantize.source import Source, refuse_nan

Weights = Mapping[str, Tensor]

_PACKED = ("qweight", "qzeros", "scales")


class LayerRunner:
    """Runs a layer on conversation number `index`, whose positions it knows (int64 [3, T])."""

    def __init__(self, config: DecoderConfig, positions: Sequence[np.ndarray]) -> None:
        self._config, self._positions = config, positions
        with torch.device("meta"):
            self._layer = DecoderLayer(config, dense, "layer", 0).eval().requires_grad_(False)

    def forward(self, weights: Weights, index: int, x: Tensor) -> Tensor:
        """[t, H], the first of the conversation's tokens -> [t, H], in the type of `x`."""
        config, positions = self._config, torch.from_numpy(self._positions[index])
        places = positions[:, None, : len(x)]
        cos, sin = mrope(places, config.mrope_section, config.head_dim, config.rope_theta)
        cache = KVCache(
            layers=1,
            batch=1,
            kv_heads=config.num_key_value_heads,
            max_tokens=len(x),
            head_dim=config.head_dim,
            dtype=x.dtype,
            device=x.device,
        )
        held = {name: tensor.to(x.device, x.dtype) for name, tensor in weights.items()}
        rope = cos.to(x.device, x.dtype), sin.to(x.device, x.dtype)
        with torch.inference_mode():
            out: Tensor = functional_call(self._layer, held, (x[None], rope, cache, 0), strict=True)
        return out[0]

    def capture(
        self, weights: Weights, index: int, x: Tensor, last: str = "mlp.down_proj"
    ) -> dict[str, Tensor]:
        """The input [T, K] of every linear up to `last`, by the linear's name in the layer. What
        comes after that is not computed."""
        seen: dict[str, Tensor] = {}
        linears = {n: m for n, m in self._layer.named_modules() if isinstance(m, nn.Linear)}
        notes = {name: _note(seen, name, last) for name in linears}
        hooks = [m.register_forward_pre_hook(notes[name]) for name, m in linears.items()]
        try:
            self.forward(weights, index, x)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return seen


class _Enough(Exception):
    """All that was wanted has been seen."""


def _note(
    seen: dict[str, Tensor], name: str, last: str
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0][0]
        if name == last:
            raise _Enough

    return hook


def read_layer(source: Source, layer: int) -> dict[str, Tensor]:
    """The layer's tensors as they are stored, by their name in the layer.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
    """
    prefix, store = source.layer_prefix(layer), source.checkpoint.store
    found = {}
    for info in source.layer_tensors(layer):
        tensor = store.read(info.name)
        refuse_nan(info, tensor.view(-1).view(torch.uint8).numpy().data)
        found[info.name.removeprefix(prefix)] = tensor
    return found


def packed_layer(store: Store, prefix: str) -> dict[str, Tensor]:
    """A quantized layer's tensors from a file, by their name in the layer."""
    names = [name for name in store.names() if name.startswith(prefix)]
    return {name.removeprefix(prefix): store.read(name) for name in names}


def dense_weights(tensors: Weights, group: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A quantized layer's weights as they will be computed with, one linear unpacked at a time."""
    packed = {n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        linear, _, kind = name.rpartition(".")
        if kind == "qweight":
            stored = {f"{linear}.{k}": tensors[f"{linear}.{k}"] for k in _PACKED}
            found |= {n: w.to(dtype) for n, w in dense_layer(stored, group).items()}
        elif linear not in packed or kind not in _PACKED:
            found[name] = tensor.to(dtype)
    return found
