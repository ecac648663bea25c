"""Operations of token2wav, counted at true shapes without doing them: on `meta`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from token2wav_rows import Way
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lowvram.config import OmniConfig
from lowvram.engine.voice import Voice
from lowvram.models.bigvgan import BigVGAN
from lowvram.models.dit import DiT
from lowvram.models.token2wav import Token2Wav


class Operations(NamedTuple):
    """Additions and multiplications in matrix products and convolutions: of all evaluations of the
    DiT, and of the vocoder."""

    dit: int
    vocoder: int


class _Counted:
    """Stands for a `forward`: asks it once for arguments of the same shapes, and adds up."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.operations = 0
        self._forward = forward
        self._known: dict[Any, tuple[int, torch.Size]] = {}

    def __get__(self, module: Any, _: Any) -> Callable[..., Tensor]:
        return lambda *arguments: self._call(module, arguments)

    def _call(self, module: Any, arguments: Sequence[Any]) -> Tensor:
        key = _shapes(arguments)
        if key not in self._known:
            attention = _Attention()
            with (
                mock.patch("lowvram.models.dit.attention", attention),
                FlopCounterMode(display=False) as counter,
            ):
                result = self._forward(module, *arguments)
            self._known[key] = counter.get_total_flops() + attention.operations, result.shape
        count, shape = self._known[key]
        self.operations += count
        return torch.empty(shape, device="meta")

    def taken(self) -> int:
        """What was added up since the last time."""
        taken, self.operations = self.operations, 0
        return taken


class _Attention:
    """Stands for the attention of the DiT's blocks, of which nothing is left on `meta`."""

    operations = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        batch, heads, rows, width = q.shape
        self.operations += 2 * 2 * batch * heads * rows * k.shape[2] * width
        return torch.empty_like(q)


def _shapes(value: Any) -> Any:
    """What of arguments decides how much there is to do."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (list, tuple)):
        return tuple(map(_shapes, value))
    if is_dataclass(value):
        return tuple(_shapes(getattr(value, one.name)) for one in fields(value))
    return value


class Counter:
    """Counts for one model, each shape once."""

    def __init__(self, config: OmniConfig, voice: Voice) -> None:
        with torch.device("meta"):
            self._model = Token2Wav(config)
        self._model.requires_grad_(False).eval()
        self._voice = voice
        self._dit, self._vocoder = _Counted(DiT.forward), _Counted(BigVGAN.forward)

    def operations(self, codes: int, way: Callable[[Token2Wav, Voice], Way]) -> Operations:
        """Of speech of so many codes, made that way."""
        with (
            mock.patch.object(DiT, "forward", self._dit),
            mock.patch.object(BigVGAN, "forward", self._vocoder),
        ):
            for _ in way(self._model, self._voice)(iter([0] * codes)):
                pass
        return Operations(self._dit.taken(), self._vocoder.taken())
