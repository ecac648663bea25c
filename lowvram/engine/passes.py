"""Prompts and steps through a decoder, in the order in which its weights and its cache arrive.

Where all is on the device, a prompt goes through in chunks of tokens. Where anything streams, it
goes layer by layer, each with every chunk, so that a streamed byte crosses once per prompt; the
states between two layers then wait on the host. Both orders compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lowvram.engine.context import Context
from lowvram.engine.graph import StepGraph
from lowvram.engine.host_kv import HostKVCache
from lowvram.engine.inputs import StepInputs, Turns
from lowvram.engine.ladder import Ladder
from lowvram.engine.spans import in_place, span_of
from lowvram.models.kv_cache import KVCache
from lowvram.models.rope import Rope
from lowvram.models.text import Decoder, DecoderLayer
from lowvram.quant import kernel_phase

TABLES_AHEAD = 64
"""Positions whose rotary tables are made on the host at a time."""

Feed = Callable[[int, int], Tensor]
"""(start, stop) -> the decoder's inputs for those tokens, [1, stop - start, H] on the device."""


class DecoderPasses:
    """One sequence through one decoder; `filled` tokens of it are in the cache.

    `chunk` prompt tokens are computed at once, or fewer where memory runs out all the same.
    """

    def __init__(
        self,
        context: Context,
        part: str,
        decoder: Decoder,
        cache: KVCache | HostKVCache,
        chunk: int,
    ) -> None:
        self._context, self._part = context, part
        self._decoder, self._cache = decoder, cache
        self._ladder = Ladder(context, part, chunk)
        self._in_place = in_place(context.device.type, cache.max_tokens)
        self._inputs: StepInputs | None = None
        self._graph: StepGraph | None = None
        self.filled = 0

    def prefill(self, feed: Feed, positions: np.ndarray, states: Tensor | None) -> Tensor:
        """Run the prompt.

        Args:
            positions: int64 [3, T].
            states: [T, H] on the host, takes the last hidden state of every token; or None.

        Returns:
            The last hidden state of the last token, [1, H] on the device.
        """
        place = torch.from_numpy(positions)[:, None]

        def run() -> Tensor:
            work = self._layer_major if self._streams else self._chunk_major
            return work(feed, place, states)

        with kernel_phase("prefill"):
            last = self._ladder.climb(run, self._again)
        self.filled = place.shape[-1]
        return last

    def step(self, x: Tensor, position: int) -> Tensor:
        """Feed one input [1, 1, H]; returns its last hidden state [1, H], which stands until the
        next step."""
        there = self._send(position, x.dtype)
        rope = there["cos"], there["sin"]

        def run() -> Tensor:
            if self._in_place:
                self._show(there["place"])
            if self._streams:
                return self._layer_by_layer(x, rope)
            if not self._in_place:
                return self._whole(x, rope)
            return self._replayed(x, rope)

        with kernel_phase("decode"):
            last = self._ladder.climb(run, self._again)
        self.filled += 1
        return last

    def _send(self, position: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the next step reads from the host, on its way to the device."""
        if self._inputs is None:
            turn = (1, 1, 1, self._decoder.config.head_dim)
            parts = {"cos": (turn, dtype), "sin": (turn, dtype), "place": ((1,), torch.int64)}
            self._inputs = StepInputs(self._context.device, parts)
            # Where the host is the device, what is made ahead counts.
            ahead = 1 if self._context.device.type == "cpu" else TABLES_AHEAD
            self._turns = Turns(self._decoder, dtype, ahead)
        host = self._inputs.fill()
        for name, table in zip(("cos", "sin"), self._turns.at(position), strict=True):
            host[name].copy_(table)
        host["place"].fill_(self.filled)
        self._inputs.send()
        return self._inputs.there

    def _show(self, place: Tensor) -> None:
        """Have attention see the token that comes, at `place` on the device."""
        cache, span = self._cache, span_of(self.filled + 1, self._cache.max_tokens)
        if cache.bias is None or len(cache.bias) != span:
            cache.follow(place, span, self.filled)
        assert cache.bias is not None
        cache.bias.index_fill_(0, place, 0)

    def _replayed(self, x: Tensor, rope: Rope) -> Tensor:
        if self._graph is None:
            self._graph = StepGraph(self._context, self._part)
            self._x = torch.empty_like(x)
        self._x.copy_(x)
        assert self._cache.bias is not None
        return self._graph.run(lambda: self._whole(self._x, rope), len(self._cache.bias))

    def _whole(self, x: Tensor, rope: Rope) -> Tensor:
        hidden: Tensor = self._decoder(x, rope, self._cache, self.filled)
        return hidden[:, -1]

    def _layer_by_layer(self, x: Tensor, rope: Rope) -> Tensor:
        for index in range(len(self._decoder.layers)):
            with self._layer(index, self.filled) as layer:
                x = layer(x, rope, self._cache, self.filled)
        last: Tensor = self._decoder.norm(x)[:, -1]
        return last

    @property
    def _streams(self) -> bool:
        """Whether layers or their keys and values come to the device one by one."""
        return isinstance(self._cache, HostKVCache) or self._context.stream(self._part).streams

    def _again(self) -> None:
        """What was under way when memory ran out is of no use."""
        if self._graph is not None:
            self._graph.forget()
        self._cache.restart()
        self._context.stream(self._part).restart()

    def _chunk_major(self, feed: Feed, place: Tensor, states: Tensor | None) -> Tensor:
        last: list[Tensor] = []

        def work(start: int, stop: int) -> None:
            x = feed(start, stop)
            rope = self._decoder.rope(place[..., start:stop], x.dtype)
            hidden = self._decoder(x, rope, self._cache, start)
            if states is not None:
                states[start:stop] = self._context.to_host(hidden[0])
            last[:] = [hidden[:, -1]]

        self._ladder.in_chunks(place.shape[-1], work)
        return last[0]

    def _layer_major(self, feed: Feed, place: Tensor, states: Tensor | None) -> Tensor:
        context, decoder, total = self._context, self._decoder, place.shape[-1]
        if states is None:
            width = decoder.config.hidden_size
            states = torch.empty(total, width, dtype=context.dtype, device=context.host)
            waiting = [states]
        else:
            waiting = []  # its owner counts it
        final = len(decoder.layers) - 1
        last: list[Tensor] = []
        # fp32 on the host once, instead of once a layer.
        tables = decoder.tables(place, context.dtype)

        def through(index: int, layer: DecoderLayer, start: int, stop: int) -> None:
            x = context.to_device(states[None, start:stop]) if index else feed(start, stop)
            rope = tuple(context.to_device(table[:, start:stop]) for table in tables)
            x = layer(x, rope, self._cache, start)
            if index == final:
                x = decoder.norm(x)
                last[:] = [x[:, -1]]
            states[start:stop] = context.to_host(x[0])

        with context.carried(f"{self._part}: between layers", *waiting, *tables):
            for index in range(final + 1):
                with self._layer(index, 0) as layer:
                    self._ladder.in_chunks(total, partial(through, index, layer))
        return last[0]

    @contextmanager
    def _layer(self, index: int, start: int) -> Iterator[DecoderLayer]:
        """That layer, and the first `start` rows of its keys and values, on the device."""
        with (
            self._context.stream(self._part).unit(index) as layer,
            self._cache.at(index, start),
        ):
            assert isinstance(layer, DecoderLayer)
            yield layer
