"""A KV cache that waits on the host and visits the device one layer at a time.

Two device buffers take turns: while one layer computes, the next one's keys and values arrive in
the other. Only rows that are new go back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lowvram.errors import DeviceError
from lowvram.models.kv_cache import KVCache
from lowvram.offload import CopyLane, Device, Mark, format_size, pin


class HostKVCache:
    """Stands in for `KVCache`; `at` brings a layer's rows to the device before it is computed.

    On the host `layers` times `[2, batch, kv_heads, max_tokens, head_dim]`, pinned where the device
    has a lane for copies; on the device two of these. `nbytes` and `tensors` are on the device.
    """

    def __init__(
        self,
        device: Device,
        *,
        layers: int,
        batch: int,
        kv_heads: int,
        max_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        kind: type[KVCache] = KVCache,
    ) -> None:
        shape = (batch, kv_heads, max_tokens, head_dim)
        self._lane: CopyLane | None = device.copy_lane()
        # As a cache of two layers, so that every write is checked and viewed in one place.
        self._buffers = kind(2, *shape, dtype, device.torch)
        data = self._buffers.data
        self._host = self._waiting(layers, data.shape[1:], data.dtype)
        self._layers = layers
        self._slot = 0  # the buffer of the layer at hand
        self._busy: list[Mark | None] = [None, None]  # behind the last copy of each buffer
        self._coming: tuple[int, int] | None = None  # (layer, rows) on its way to the other buffer
        self._new = range(0)  # rows of the layer at hand that were written

    def _waiting(self, layers: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """Memory for every layer's keys and values, each of `shape`."""
        if self._lane is None:
            return [torch.empty(shape, dtype=dtype, device="cpu") for _ in range(layers)]
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        try:
            buffers = pin(self._lane, [nbytes] * layers)
        except (RuntimeError, MemoryError) as error:
            raise DeviceError(
                f"no {format_size(layers * nbytes)} of pinned host memory could be had for the "
                f"keys and values of {shape[-2]} tokens ({str(error).splitlines()[0][:160]}); free "
                "host memory, or give a larger budget so that they stay on the device"
            ) from error
        return [buffer.view(dtype).view(shape) for buffer in buffers]

    @property
    def max_tokens(self) -> int:
        return self._buffers.max_tokens

    @property
    def nbytes(self) -> int:
        return self._buffers.nbytes

    @property
    def tensors(self) -> list[Tensor]:
        return self._buffers.tensors

    @property
    def error(self) -> float | None:
        """As `KVCache.error`."""
        return self._buffers.error

    @property
    def bias(self) -> Tensor | None:
        """As `KVCache.bias`."""
        return self._buffers.bias

    def follow(self, place: Tensor, span: int, filled: int) -> None:
        """As `KVCache.follow`."""
        self._buffers.follow(place, span, filled)

    @contextmanager
    def at(self, index: int, start: int) -> Iterator[None]:
        """Inside, rows 0 to `start` of layer `index` are on the device and more may be written.

        The new rows go back to the host afterwards. The next layer's rows come meanwhile; after
        the last layer that is the first one, with as many rows more as were written.
        """
        if self._coming == (index, start):
            self._slot = 1 - self._slot
        else:
            self._fetch(self._slot, index, start)
        self._coming = None
        self._wait(self._slot)
        # A prompt's layers begin empty, and a single layer has no other to go on with.
        if start and self._layers > 1:
            after = (index + 1) % self._layers
            rows = start if after else start + len(self._new)
            self._fetch(1 - self._slot, after, rows)
            self._coming = (after, rows)
        self._new = range(start, start)
        yield
        self._send(index)
        if not start:
            self._slot = 1 - self._slot

    def write(self, index: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.write`, of the layer that `at` was entered for."""
        self._new = range(self._new.start, start + keys.shape[2])
        return self._buffers.write(self._slot, start, keys, values)

    def _fetch(self, slot: int, index: int, rows: int) -> None:
        """Queue the copy of a layer's first `rows` to a buffer that computing is done with."""
        self._copy(self._of_buffer(slot), self._host[index], range(rows))
        self._busy[slot] = self._mark()

    def _send(self, index: int) -> None:
        """Queue the copy of the new rows back to the host."""
        if self._lane is None:
            # Copies are at once here, and `meta` has nothing to give back.
            if not self._buffers.data.is_meta:
                self._copy(self._host[index], self._of_buffer(self._slot), self._new)
            return
        self._copy(self._host[index], self._of_buffer(self._slot), self._new)
        self._busy[self._slot] = self._mark()

    def _copy(self, target: Tensor, source: Tensor, rows: range) -> None:
        """`rows` of one layer `[2, batch, kv_heads, max_tokens, head_dim]`, run by run."""
        if not rows:
            return
        if self._lane is not None:
            self._lane.after_compute()
        for to, of in zip(target.flatten(0, 2), source.flatten(0, 2), strict=True):
            piece, given = to[rows.start : rows.stop], of[rows.start : rows.stop]
            if self._lane is None:
                piece.copy_(given)
            else:
                self._lane.copy(piece, given)

    def _of_buffer(self, slot: int) -> Tensor:
        return self._buffers.data[slot]

    def _mark(self) -> Mark | None:
        return None if self._lane is None else self._lane.mark()

    def _wait(self, slot: int) -> None:
        """Computing from here on comes after every copy from or to that buffer."""
        mark = self._busy[slot]
        if self._lane is not None and mark is not None:
            self._lane.wait(mark)

    def restart(self) -> None:
        """A prompt begins anew, whatever was under way."""
        self._coming, self._new = None, range(0)

    def free(self) -> None:
        """Give both sides' memory back, once no copy is under way; nothing can be written after."""
        for mark in self._busy:
            if mark is not None:
                mark.synchronize()
        self._buffers.free()
        self._host = []
        self._busy, self._coming = [None, None], None
        if self._lane is not None:
            self._lane.trim_host()
