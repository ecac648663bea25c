"""Drawing the next token. The order of the steps is that of transformers' `generate`:
repetition penalty, suppressed tokens, temperature, top-k, top-p, draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowvram.settings import SamplingSettings


class Sampler:
    """Draws token ids from logits, with a history for the repetition penalty.

    Draws happen on the CPU from a generator of its own, so that the same seed gives the same ids
    on every device. Plain greedy needs no history and leaves the logits where they are.

    On the `meta` device, where logits have no values, every draw is token 0.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        *,
        seed: int,
        suppress: Sequence[int] = (),
        history: Sequence[int] = (),
    ) -> None:
        self._settings = settings
        self._generator = torch.Generator().manual_seed(seed)
        self._suppress = torch.tensor(list(suppress), dtype=torch.long)
        self._seen = torch.tensor(sorted(set(history)), dtype=torch.long)

    def __call__(self, logits: torch.Tensor) -> int:
        """The next id from `logits` [1, V]."""
        if logits.is_meta:
            return 0
        scores = self.scores(logits[0])
        if self._settings.temperature:
            token = int(torch.multinomial(scores.softmax(0), 1, generator=self._generator))
        else:
            token = int(scores.argmax())
        if self._settings.repetition_penalty != 1:
            self._seen = torch.unique(torch.cat([self._seen, torch.tensor([token])]))
        return token

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [V] after every step but the draw, float32; cut ids are -inf."""
        settings = self._settings
        scores = logits.float()
        if settings.temperature or settings.repetition_penalty != 1:
            scores = scores.cpu()
        if settings.repetition_penalty != 1 and len(self._seen):
            seen = scores[self._seen]
            penalty = settings.repetition_penalty
            seen = torch.where(seen < 0, seen * penalty, seen / penalty)
            scores = scores.index_copy(0, self._seen, seen)
        if len(self._suppress):
            scores = scores.index_fill(0, self._suppress.to(scores.device), -torch.inf)
        return self._cut(scores / settings.temperature) if settings.temperature else scores

    def _cut(self, scores: torch.Tensor) -> torch.Tensor:
        settings = self._settings
        if settings.top_k and settings.top_k < len(scores):
            floor = scores.topk(settings.top_k).values[-1]
            scores = scores.masked_fill(scores < floor, -torch.inf)
        if settings.top_p < 1:
            ordered, order = scores.sort()
            # The tail whose whole probability is at most 1 - top_p; the likeliest id stays.
            tail = ordered.softmax(0).cumsum(0) <= 1 - settings.top_p
            tail[-1] = False
            scores = scores.index_fill(0, order[tail], -torch.inf)
        return scores
