"""Keys and values in int8: rounded as they are written, wide again one layer at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.models.kv_cache import KVCache
from lowvram.models.kv_rows import groups, row_bytes


class RoundedKVCache(KVCache):
    """A `KVCache` whose `data` is int8 [layers, 2, batch, kv_heads, max_tokens, row_bytes]: the
    numbers of a head rounded to the nearest, and then a scale of `dtype` for every 32 of them.

    `write` returns all keys and values of the layer in `dtype`, from the rounded ones, those just
    written too: how a prompt is cut changes nothing. They are in memory that all layers share, and
    stand until the next `write`.
    """

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
        row = row_bytes(head_dim, dtype.itemsize)
        super().__init__(layers, batch, kv_heads, max_tokens, row, torch.int8, device)
        self._width, self._dtype = head_dim, dtype
        self._split = groups(head_dim), head_dim // groups(head_dim)
        shape = (2, batch, kv_heads, max_tokens, head_dim)
        self._wide = torch.empty(shape, dtype=dtype, device=device)
        self._moved: tuple[Tensor, Tensor] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [self.data, self._wide]

    @property
    def error(self) -> float | None:
        """By how much rounding moved the keys and values of the token written last in a prompt, in
        the layer written last: relative, by the Euclidean norm. None on meta, or without any."""
        if self._moved is None or self._moved[0].is_meta:
            return None
        off, whole = self._moved
        return float(off / whole)

    def write(self, index: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.write`."""
        found = super().write(index, start, keys, values)
        if self._place is None and (keys.shape[2] > 1 or self._moved is None):
            self._judge((keys, values), found)
        return found

    def free(self) -> None:
        """As `KVCache.free`."""
        super().free()
        self._wide = self._wide.new_empty(0)

    def _store(self, new: Tensor, rows: Tensor) -> None:
        numbers, scales = self._parts(rows)
        wide = new.to(torch.float32, copy=True).unflatten(-1, self._split)
        largest = torch.maximum(wide.amax(-1), wide.amin(-1).neg_())
        # float16 has none smaller, and nothing is divided by 0.
        step = largest.div_(127).clamp_(min=1e-7).to(self._dtype)
        scales.copy_(step)
        wide.div_(step.float().unsqueeze(-1)).round_().clamp_(-127, 127)
        numbers.copy_(wide)

    def _store_one(self, new: Tensor, rows: Tensor, place: Tensor) -> None:
        one = rows.new_empty(*new.shape[:3], rows.shape[3])
        self._store(new, one)
        super()._store_one(one, rows, place)

    def _read(self, index: int, stop: int) -> tuple[Tensor, Tensor]:
        for rows, wide in zip(self.layer(index), self._wide.unbind(0), strict=True):
            numbers, scales = self._parts(rows[:, :, :stop])
            grouped = wide[:, :, :stop].unflatten(-1, self._split)
            grouped.copy_(numbers).mul_(scales.unsqueeze(-1))
        keys, values = self._wide[:, :, :, :stop].unbind(0)
        return keys, values

    def _parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers [.., groups, width of one] and scales [.., groups]."""
        numbers = rows[..., : self._width].unflatten(-1, self._split)
        return numbers, rows[..., self._width :].view(self._dtype)

    def _judge(self, given: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> None:
        new = torch.stack([one[:, :, -1] for one in given]).float()
        off = torch.stack([one[:, :, -1] for one in found]).float().sub_(new)
        self._moved = off.norm(), new.norm()
