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
        if self._place is not None and self.bias is not None:
            return self._write_one(index, self._place, len(self.bias), keys, values)
        end = start + keys.shape[2]
        if end > self.max_tokens:
            raise ValueError(f"{end} tokens in a KV cache made for {self.max_tokens}")
        for rows, new in zip(self.layer(index), (keys, values), strict=True):
            self._round(new, rows[:, :, start:end])
        found = self._widened(index, end)
        if keys.shape[2] > 1 or self._moved is None:
            self._judge((keys, values), found)
        return found

    def _write_one(
        self, index: int, place: Tensor, span: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        for rows, new in zip(self.layer(index), (keys, values), strict=True):
            one = rows.new_empty(*new.shape[:3], rows.shape[3])
            self._round(new, one)
            rows.index_copy_(2, place, one)
        return self._widened(index, span)

    def free(self) -> None:
        """As `KVCache.free`."""
        super().free()
        self._wide = self._wide.new_empty(0)

    def _round(self, new: Tensor, rows: Tensor) -> None:
        """[B, Hkv, T, D] into int8 [B, Hkv, T, row]."""
        numbers, scales = self._parts(rows)
        wide = new.to(torch.float32, copy=True).unflatten(-1, self._split)
        largest = torch.maximum(wide.amax(-1), wide.amin(-1).neg_())
        # float16 has none smaller, and nothing is divided by 0.
        step = largest.div_(127).clamp_(min=1e-7).to(self._dtype)
        scales.copy_(step)
        wide.div_(step.float().unsqueeze(-1)).round_().clamp_(-127, 127)
        numbers.copy_(wide)

    def _widened(self, index: int, stop: int) -> tuple[Tensor, Tensor]:
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
