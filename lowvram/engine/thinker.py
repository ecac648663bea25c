"""The Thinker over one prompt: prefill in chunks, then a token at a time."""

from __future__ import annotations

import numpy as np
import torch

from lowvram.engine.context import Context
from lowvram.engine.host_kv import HostKVCache
from lowvram.engine.passes import DecoderPasses
from lowvram.models.head import PiecewiseHead
from lowvram.models.kv_cache import KVCache
from lowvram.models.text import ThinkerText
from lowvram.parts import HEAD
from lowvram.quant import RoundedHead, kernel_phase

PART = "text"

HEAD_SAMPLE = 256
"""Rows of the head by which its rounding is judged."""


class Thinker:
    """The text model, its KV cache, and how far the cache is filled."""

    def __init__(
        self, context: Context, model: ThinkerText, cache: KVCache | HostKVCache, chunk: int
    ) -> None:
        self._context = context
        self._model = model
        self._passes = DecoderPasses(context, PART, model.model, cache, chunk)
        self.head_error: float | None = None
        """Of a rounded head: relative error of the logits of the prompt's last position."""

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
            self.head_error = self._head_error(hidden, logits)
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

    def _head_error(self, hidden: torch.Tensor, logits: torch.Tensor) -> float | None:
        """Against the head in the file, of which some rows are read; None if it is not rounded."""
        head = self._model.lm_head
        if not isinstance(head, RoundedHead) or not head.rounded:
            return None
        rows = range(0, head.out_features, max(1, head.out_features // HEAD_SAMPLE))
        stored = self._context.store.rows(f"{HEAD}.weight", list(rows)).float()
        exact = hidden.float() @ stored.T
        return float((logits[:, list(rows)] - exact).norm() / exact.norm())
