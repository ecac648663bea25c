"""Keys and values of a decoder, allocated once for the longest sequence of the request."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_AT_HAND: AbstractContextManager[None] = nullcontext()


class KVCache:
    """One tensor `data` [layers, 2, batch, kv_heads, max_tokens, head_dim]; uninitialised until
    written, and only what was written is ever returned."""

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        max_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.max_tokens = max_tokens
        self.data = torch.empty(
            layers, 2, batch, kv_heads, max_tokens, head_dim, dtype=dtype, device=device
        )
        # Views made once: a step of decoding asks for every layer's.
        self._views = [layer.unbind(0) for layer in self.data.unbind(0)]
        self._place: Tensor | None = None
        self.bias: Tensor | None = None
        """Added to the scores of what `write` returns, where `follow` was called; else None."""

    @staticmethod
    def bytes_for(
        layers: int,
        batch: int,
        kv_heads: int,
        max_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> int:
        """Bytes that a cache of this shape takes."""
        return 2 * math.prod((layers, batch, kv_heads, max_tokens, head_dim)) * dtype.itemsize

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds on the device."""
        return [self.data]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def error(self) -> float | None:
        """What keeping keys and values as they are kept costs; None where it costs nothing."""
        return None

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each a view [B, Hkv, max_tokens, D]."""
        keys, values = self._views[index]
        return keys, values

    def write(self, index: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store tokens `start` to `start + T` of a layer.

        Args:
            keys, values: [B, Hkv, T, D].

        Returns:
            All keys and values of that layer up to `start + T`, each [B, Hkv, start + T, D].

        Raises:
            ValueError: the cache is shorter than that.
        """
        if self._place is not None and self.bias is not None:
            for rows, new in zip(self.layer(index), (keys, values), strict=True):
                self._store_one(new, rows, self._place)
            return self._read(index, len(self.bias))
        end = start + keys.shape[2]
        if end > self.max_tokens:
            raise ValueError(f"{end} tokens in a KV cache made for {self.max_tokens}")
        for rows, new in zip(self.layer(index), (keys, values), strict=True):
            self._store(new, rows[:, :, start:end])
        return self._read(index, end)

    def follow(self, place: Tensor, span: int, filled: int) -> None:
        """From now on tokens come one by one, each to `place` (int64 [1], on the device), and
        `write` returns `span` keys and values. `bias`, fp32 [span], hides those that are not
        written: 0 for the first `filled`, to be set to 0 for each token that comes.

        So every token does the same to the same memory, and it can be recorded.
        """
        if span > self.max_tokens:
            raise ValueError(f"{span} tokens in a KV cache made for {self.max_tokens}")
        # Hidden values are multiplied by 0, which needs numbers.
        self.data[..., filled:span, :].zero_()
        bias = torch.full((span,), -torch.inf, device=self.data.device)
        bias[:filled] = 0
        self._place, self.bias = place, bias

    def _store(self, new: Tensor, rows: Tensor) -> None:
        """[B, Hkv, T, D] into as many rows of `data`."""
        rows.copy_(new)

    def _store_one(self, new: Tensor, rows: Tensor, place: Tensor) -> None:
        """[B, Hkv, 1, D] into the row at `place` of all of a layer's."""
        rows.index_copy_(2, place, new)

    def _read(self, index: int, stop: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of the first `stop` tokens."""
        keys, values = self.layer(index)
        return keys[:, :, :stop], values[:, :, :stop]

    def at(self, index: int, start: int) -> AbstractContextManager[None]:
        """Entered around the work on one layer, of which the first `start` rows are needed: here
        every layer is always at hand. `engine/host_kv.py` has a cache that has to fetch it."""
        return _AT_HAND

    def restart(self) -> None:
        """A prompt begins anew; what was written no longer counts."""

    def free(self) -> None:
        """Give the memory back, whoever still holds the cache; nothing can be written after."""
        self.data = self.data.new_empty(0)
        self._views = []
        self._place = self.bias = None
        self.max_tokens = 0
