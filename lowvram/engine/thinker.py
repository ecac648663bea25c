"""The Thinker over one prompt: prefill in chunks, then a token at a time."""

from __future__ import annotations

import numpy as np
import torch

from lowvram.engine.context import Context
from lowvram.models.kv_cache import KVCache
from lowvram.models.text import ThinkerText
from lowvram.parts import HEAD
from lowvram.planner.laws import PREFILL_CHUNK
from lowvram.quant import RoundedHead, kernel_phase

HEAD_SAMPLE = 256
"""Rows of the head by which its rounding is judged."""


class Thinker:
    """The text model, its KV cache, and how far the cache is filled."""

    def __init__(self, context: Context, model: ThinkerText, cache: KVCache) -> None:
        self._context = context
        self._model = model
        self._cache = cache
        self._filled = 0
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
        place = torch.from_numpy(positions)[:, None]
        with kernel_phase("prefill"):
            for start in range(0, len(embeds), PREFILL_CHUNK):
                stop = start + PREFILL_CHUNK
                hidden = self._forward(embeds[None, start:stop], place[..., start:stop])
                if states is not None:
                    states[start:stop] = self._context.to_host(hidden[0])
            logits = self._model.logits(hidden[:, -1])
            self.head_error = self._head_error(hidden[:, -1], logits)
            return logits

    def step(self, embed: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Feed one embedding [1, H]; returns its logits [1, V] and last hidden state [1, H]."""
        place = torch.full((3, 1, 1), position, dtype=torch.long)
        with kernel_phase("decode"):
            hidden = self._forward(embed[None], place)[:, -1]
            return self._model.logits(hidden), hidden

    def _forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        decoder = self._model.model
        x = self._context.to_device(x)
        rope = decoder.rope(positions, x.dtype)
        hidden: torch.Tensor = decoder(x, rope, self._cache, self._filled)
        self._filled += x.shape[1]
        return hidden

    def _head_error(self, hidden: torch.Tensor, logits: torch.Tensor) -> float | None:
        """Against the head in the file, of which some rows are read; None if it is not rounded."""
        head = self._model.lm_head
        if not isinstance(head, RoundedHead) or not head.rounded:
            return None
        rows = range(0, head.out_features, max(1, head.out_features // HEAD_SAMPLE))
        stored = self._context.store.rows(f"{HEAD}.weight", list(rows)).float()
        exact = hidden.float() @ stored.T
        return float((logits[:, list(rows)] - exact).norm() / exact.norm())
