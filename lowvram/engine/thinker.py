"""The Thinker over one prompt: prefill in chunks, then a token at a time."""

from __future__ import annotations

import numpy as np
import torch

from lowvram.engine.context import Context
from lowvram.engine.host_kv import HostKVCache
from lowvram.engine.passes import DecoderPasses
from lowvram.engine.roundoff import rounding_error
from lowvram.models.head import PiecewiseHead
from lowvram.models.kv_cache import KVCache
from lowvram.models.text import ThinkerText
from lowvram.parts import HEAD
from lowvram.quant import RoundedHead, kernel_phase

PART = "text"


class Thinker:
    """The text model, its KV cache, and how far the cache is filled."""

    def __init__(
        self, context: Context, model: ThinkerText, cache: KVCache | HostKVCache, chunk: int
    ) -> None:
        self._context = context
        self._model = model
        self._passes = DecoderPasses(context, PART, model.model, cache, chunk)

    def prefill(
        self, embeds: torch.Tensor, positions: np.ndarray, states: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the prompt.

        Args:
            embeds: [T, H] on the host.
            positions: int64 [3, T].
            states: [T, H] on the host, takes the last hidden state of every token; or None.

        Returns:
            Logits of the last position [1, V].
        """

        def feed(start: int, stop: int) -> torch.Tensor:
            return self._context.to_device(embeds[None, start:stop])

        hidden = self._passes.prefill(feed, positions, states)
        with kernel_phase("prefill"):
            logits = self._logits(hidden)
            self._judge_head(hidden, logits)
        return logits

    def step(self, embed: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Feed one embedding [1, H]; returns its logits [1, V] and last hidden state [1, H]."""
        hidden = self._passes.step(self._context.to_device(embed[None]), position)
        with kernel_phase("decode"):
            return self._logits(hidden), hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        stream = self._context.stream(PART)
        head = self._model.lm_head
        if not stream.streams or not isinstance(head, PiecewiseHead):
            return self._model.logits(hidden)
        first = len(self._model.model.layers)
        scores = []
        for index in range(first, first + len(head.pieces)):
            with stream.unit(index) as piece:
                scores.append(piece(hidden))
        return torch.cat(scores, dim=-1).float()

    def _judge_head(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Leave with the context by how much a rounded head moves the prompt's last logits."""
        head = self._model.lm_head
        if isinstance(head, RoundedHead) and head.rounded:
            error = rounding_error(self._context.store, HEAD, hidden, logits)
            self._context.option_errors[f"head{head.bits}"] = error
