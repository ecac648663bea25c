"""The vision tower, one pair of frames (or one image) at a time.

Attention never crosses a frame pair, so going pair by pair changes nothing. Most blocks attend
within square windows; cells are put in window order once, windows of one size side by side, so
that each size is one batch and no mask is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowvram.config import VisionConfig
from lowvram.models.attention import attention
from lowvram.models.layers import GatedMLP, RMSNorm
from lowvram.models.linear import dense
from lowvram.models.rope import Rope, axial, rotate

Groups = Sequence[tuple[int, int]]
"""(how many, how long) of the runs of patches that attend among themselves, in order."""


@functools.lru_cache(maxsize=16)
def window_order(rows: int, columns: int, side: int) -> tuple[list[int], Groups]:
    """Cells of a `rows` x `columns` grid in window order.

    A cell is a square of merged patches, cells are numbered row by row, and windows are `side`
    cells square, smaller at the right and lower edge.

    Returns:
        The cells, window after window and windows of one size together; and for each size the
        number of windows and of cells in one.
    """
    by_size: dict[int, list[list[int]]] = {}
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            cells = [
                row * columns + column
                for row in range(top, min(top + side, rows))
                for column in range(left, min(left + side, columns))
            ]
            by_size.setdefault(len(cells), []).append(cells)
    order = [cell for windows in by_size.values() for cells in windows for cell in cells]
    return order, tuple((len(windows), size) for size, windows in by_size.items())


class PatchEmbed(nn.Module):
    """A 3-D convolution whose stride is its kernel, worked out as a linear over flat patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(
            config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False
        )

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight
        return nn.functional.linear(patches.to(weight.dtype), weight.flatten(1))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.num_heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope, groups: Groups) -> Tensor:
        """[N, width] -> [N, width]; each run of `groups` sees itself only."""
        heads = (-1, self.head_dim)
        q = rotate(self.q(x).unflatten(-1, heads), rope)
        k = rotate(self.k(x).unflatten(-1, heads), rope)
        v = self.v(x).unflatten(-1, heads)
        sizes = [count * length for count, length in groups]
        runs = zip(groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        mixed = torch.cat([_attend(group, *parts) for group, *parts in runs])
        out: Tensor = self.proj(mixed.flatten(1))
        return out


def _attend(group: tuple[int, int], *parts: Tensor) -> Tensor:
    """q, k, v [count * length, heads, D] -> the same shape, each run of `length` by itself."""
    q, k, v = (part.unflatten(0, group).transpose(1, 2) for part in parts)
    return attention(q, k, v, causal=False).transpose(1, 2).flatten(0, 1)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = RMSNorm(width)
        self.norm2 = RMSNorm(width)
        self.attn = VisionAttention(config)
        self.mlp = GatedMLP(width, config.intermediate_size, dense, "mlp", bias=True)

    def forward(self, x: Tensor, rope: Rope, groups: Groups) -> Tensor:
        attended: Tensor = self.attn(self.norm1(x), rope, groups)
        x = attended.add_(x)
        out: Tensor = self.mlp(self.norm2(x))
        return out.add_(x)


class PatchMerger(nn.Module):
    """Every merged square of patches becomes one embedding of the text model."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        merged = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        cells = self.mlp[0].in_features
        out: Tensor = self.mlp(self.ln_q(x).view(-1, cells))
        return out


class VisionTower(nn.Module):
    """Parameters are named as in the checkpoint, after `thinker.visual.`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, patches: Tensor, grid_h: int, grid_w: int) -> Tensor:
        """Embed one frame pair.

        Args:
            patches: [grid_h * grid_w, patch_values], in the order of the published processor:
                square by merged square, row by row; values channel, frame, row, column.
            grid_h, grid_w: patches from top to bottom and from left to right, multiples of
                `spatial_merge_size`.

        Returns:
            [grid_h * grid_w / 4, out_hidden_size], row by row.
        """
        config = self.config
        merge = config.spatial_merge_size
        side = config.window_size // config.patch_size // merge
        order, windows = window_order(grid_h // merge, grid_w // merge, side)
        device = patches.device
        shuffle = torch.tensor(order, device="cpu")

        x = self.patch_embed(patches)
        x = x.unflatten(0, (-1, merge**2)).index_select(0, shuffle.to(device)).flatten(0, 1)
        cos, sin = self._rope(grid_h, grid_w, shuffle)
        rope = (cos.to(device), sin.to(device))
        windowed = [(count, cells * merge**2) for count, cells in windows]
        whole = [(1, grid_h * grid_w)]
        for i, block in enumerate(self.blocks):
            x = block(x, rope, whole if i in config.fullatt_block_indexes else windowed)
        merged: Tensor = self.merger(x)
        return merged.index_select(0, shuffle.argsort().to(device))

    def _rope(self, grid_h: int, grid_w: int, shuffle: Tensor) -> Rope:
        """fp32 tables on the host for the patches in window order."""
        merge = self.config.spatial_merge_size
        places = torch.arange(grid_h * grid_w, device="cpu").view(
            grid_h // merge, merge, grid_w // merge, merge
        )
        places = places.transpose(1, 2).reshape(-1, merge**2)[shuffle].flatten()
        head_dim = self.config.hidden_size // self.config.num_heads
        rows = torch.div(places, grid_w, rounding_mode="floor")
        return axial(rows, places % grid_w, head_dim)
