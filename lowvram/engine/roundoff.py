"""What the options that round weights cost, measured on the way: cheap, on numbers of the request.

Each is the relative error (Euclidean norm) of some outputs of one linear, for an input that it gets
in the request, against the weights in the file. What all layers together make of it is a few times
as much; a mistake would be larger by far.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowvram.engine.context import Context
from lowvram.models.talker import Talker
from lowvram.models.token2wav import Token2Wav
from lowvram.offload import Store
from lowvram.quant import RoundedLinear, apply_all, kernel_phase

SAMPLE = 256
"""Outputs by which the rounding of a linear is judged."""


def rounding_error(store: Store, name: str, x: Tensor, found: Tensor) -> float:
    """Of `found` [1, N], the outputs of the linear that the file calls `name`, for `x` [1, K]. Some
    rows of its weight are read."""
    outputs = found.shape[1]
    rows = list(range(0, outputs, max(1, outputs // SAMPLE)))
    exact = x.float().cpu() @ store.rows(f"{name}.weight", rows).float().T
    if store.has(f"{name}.bias"):
        exact += store.rows(f"{name}.bias", rows).float()
    return float((found.float().cpu()[:, rows] - exact).norm() / exact.norm())


@contextmanager
def judged_talker(context: Context, talker: Talker) -> Iterator[None]:
    """Around the Talker's prompt: leaves the error of `talker8` with the context, by the last
    layer's `gate_proj`."""
    last = len(talker.model.layers) - 1
    mlp: Any = talker.model.layers[last].mlp
    if not isinstance(mlp.gate_proj, RoundedLinear) or context.device.type == "meta":
        yield
        return
    seen: list[Tensor] = []

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = [inputs[0][:, -1].clone()]

    hook = mlp.register_forward_pre_hook(see)
    try:
        yield
    finally:
        hook.remove()
    with context.phase("talk"), kernel_phase("decode"):
        found = apply_all((mlp.gate_proj, mlp.up_proj), seen[0])[0]
        name = f"talker.model.layers.{last}.mlp.gate_proj"
        error = rounding_error(context.store, name, seen[0], found)
    context.option_errors["talker8"] = error


@contextmanager
def judged_vocoder(context: Context, token2wav: Token2Wav) -> Iterator[None]:
    """Around the speech of a request: leaves the error of `vocoder16` with the context, by the
    first linear of the last layer's MLP, and the last frame of its first evaluation."""
    dit = token2wav.code2wav_dit_model
    if dit.dtype == torch.float32 or context.device.type == "meta":
        yield
        return
    last = len(dit.transformer_blocks) - 1
    linear: Any = dit.get_submodule(f"transformer_blocks.{last}.ff.ff.0")
    seen: list[Tensor] = []

    def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend(frames[0, -1:].clone() for frames in (inputs[0], output))
        hook.remove()

    hook = linear.register_forward_hook(see)
    try:
        yield
    finally:
        hook.remove()
    if seen:
        name = f"token2wav.code2wav_dit_model.transformer_blocks.{last}.ff.ff.0"
        context.option_errors["vocoder16"] = rounding_error(context.store, name, *seen)
