"""Drawing the next token. The order of the steps is that of transformers' `generate`:
repetition penalty, suppressed tokens, temperature, top-k, top-p, draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowvram.settings import SamplingSettings


class Sampler:
    """Draws token ids from logits, with a history for the repetition penalty.

    What is random is made on the host from a generator of its own, so that the same seed gives the
    same draws on every device; they are those of `torch.multinomial`. A call draws on the host, and
    holds nothing between two draws but the history. `draw` does it all where the logits are, in
    buffers that stay.
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
        self._suppress, self._history = list(suppress), sorted(set(history))
        self._buffers: _Buffers | None = None
        self._seen: Tensor | None = None

    @property
    def random(self) -> bool:
        """Whether a draw needs noise."""
        return self._settings.temperature > 0

    @property
    def tensors(self) -> list[Tensor]:
        """What stays from one `draw` to the next."""
        seen = [] if self._seen is None else [self._seen]
        return seen + (self._buffers.tensors if self._buffers else [])

    def __call__(self, logits: Tensor) -> int:
        """The next id from `logits` [1, V], drawn on the host; greedily where they are.

        On the `meta` device, where logits have no values, every draw is token 0.
        """
        if logits.is_meta:
            return 0
        if self.random or self._settings.repetition_penalty != 1:
            logits = logits.cpu()
        noise = None
        if self.random:
            noise = self.make_noise(torch.empty_like(logits[0], dtype=torch.float32))
        token = int(self.draw(logits, noise))
        self._buffers = None
        return token

    def make_noise(self, out: Tensor) -> Tensor:
        """Fill fp32 `out` [V] on the host with what the next draw needs, once for every draw."""
        return out.exponential_(generator=self._generator)

    def draw(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """The next id, int64 [1] where the logits are; the host waits for nothing.

        The result is the same tensor every time. After the first draw nothing is allocated.

        Args:
            logits: [1, V].
            noise: of `make_noise`, [V] where the logits are; None where nothing is `random`.
        """
        buffers = self._buffers or self._make_buffers(logits)
        chances = self._scores(logits[0], buffers)
        if noise is not None:
            # The first of exponential clocks of these rates to ring: a draw by these chances.
            chances = torch.softmax(chances, 0, out=buffers.work).div_(noise)
        torch.argmax(chances, 0, keepdim=True, out=buffers.token)
        if self._seen is not None:
            self._seen.index_fill_(0, buffers.token, True)
        return buffers.token

    def scores(self, logits: Tensor) -> Tensor:
        """Logits [V] after every step but the draw, float32; cut ids are -inf."""
        return self._scores(logits, self._make_buffers(logits[None])).clone()

    def _make_buffers(self, logits: Tensor) -> _Buffers:
        vocab, device = logits.shape[-1], logits.device
        if self._settings.repetition_penalty != 1 and self._seen is None:
            seen = torch.zeros(vocab, dtype=torch.bool, device="cpu")
            seen[self._history] = True
            self._seen = seen.to(device)
        self._buffers = _Buffers(vocab, self._settings, self._suppress, device)
        return self._buffers

    def _scores(self, logits: Tensor, buffers: _Buffers) -> Tensor:
        settings, scores = self._settings, buffers.scores.copy_(logits)
        penalty = settings.repetition_penalty
        if self._seen is not None:
            lower, higher = buffers.work, buffers.ordered
            torch.mul(scores, penalty, out=lower)
            torch.div(scores, penalty, out=higher)
            # Negative scores are multiplied, positive ones divided.
            pick = torch.minimum if penalty > 1 else torch.maximum
            pick(lower, higher, out=lower)
            torch.where(self._seen, lower, scores, out=scores)
        if buffers.suppress is not None:
            scores.index_fill_(0, buffers.suppress, -torch.inf)
        if settings.temperature:
            self._cut(scores.div_(settings.temperature), buffers)
        return scores

    def _cut(self, scores: Tensor, buffers: _Buffers) -> None:
        settings = self._settings
        if 0 < settings.top_k < len(scores):
            torch.topk(scores, settings.top_k, out=(buffers.top, buffers.top_order))
            torch.lt(scores, buffers.top[-1:], out=buffers.cut)
            scores.masked_fill_(buffers.cut, -torch.inf)
        if settings.top_p < 1:
            torch.sort(scores, out=(buffers.ordered, buffers.order))
            chances = torch.softmax(buffers.ordered, 0, out=buffers.work)
            # The tail whose whole probability is at most 1 - top_p; the likeliest id stays.
            below = torch.cumsum(chances, 0, out=buffers.ordered)
            tail = torch.le(below, 1 - settings.top_p, out=buffers.tail)
            tail[-1:].fill_(False)
            scores.masked_fill_(buffers.cut.scatter_(0, buffers.order, tail), -torch.inf)


class _Buffers:
    """What a draw from `vocab` logits writes: 23 bytes for each with every setting in use, 4 for
    plain greedy."""

    def __init__(
        self,
        vocab: int,
        settings: SamplingSettings,
        suppress: Sequence[int],
        device: torch.device,
    ) -> None:
        def make(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        plain = not settings.temperature and settings.repetition_penalty == 1
        sorts = settings.top_p < 1
        self.token = make(1, torch.int64)
        self.scores = make(vocab)
        self.work, self.ordered = (make(0 if plain else vocab) for _ in range(2))
        self.cut = make(0 if plain else vocab, torch.bool)
        self.order = make(vocab if sorts else 0, torch.int64)
        self.tail = make(vocab if sorts else 0, torch.bool)
        top = settings.top_k if settings.top_k < vocab else 0
        self.top, self.top_order = make(top), make(top, torch.int64)
        self.suppress = torch.tensor(suppress, device=device) if suppress else None

    @property
    def tensors(self) -> list[Tensor]:
        return [one for one in vars(self).values() if one is not None]
