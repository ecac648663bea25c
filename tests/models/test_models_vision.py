"""The vision tower, a frame pair at a time, against Qwen2_5OmniVisionEncoder on whole clips."""

from __future__ import annotations

import copy

import pytest
import torch
from thinker_oracle import Oracle, assert_close, loaded, oracle

from lowvram.models import VisionTower
from lowvram.models.vision import window_order

# (frame pairs, rows, columns) of patches; a full window is 8 x 8.
GRIDS = [
    (1, 8, 8),
    (1, 2, 2),
    (1, 2, 30),
    (1, 4, 6),
    (1, 18, 8),
    (1, 16, 24),
    (1, 30, 14),
    (3, 10, 14),
    (4, 12, 20),
]


def tower_of(truth: Oracle) -> VisionTower:
    config = truth.config.thinker.vision
    return loaded(lambda: VisionTower(config), truth.part("thinker.visual."))


def patches_of(grid: tuple[int, int, int], seed: int) -> torch.Tensor:
    pairs, rows, columns = grid
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(pairs * rows * columns, 3 * 2 * 14 * 14, generator=generator)


@pytest.mark.oracle
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_pair_by_pair_equals_the_clip(seed: int, grid: tuple[int, int, int]) -> None:
    truth = oracle(seed)
    patches = patches_of(grid, seed)
    theirs = truth.find("Qwen2_5OmniVisionEncoder")(patches, grid_thw=torch.tensor([grid]))
    tower = tower_of(truth)
    pairs, rows, columns = grid
    ours = [tower(pair, rows, columns) for pair in patches.chunk(pairs)]
    assert_close(torch.cat(ours), theirs.pooler_output)


@pytest.mark.oracle
@torch.no_grad()
def test_sixteen_bit() -> None:
    truth = oracle(2)
    exact = truth.find("Qwen2_5OmniVisionEncoder")
    rounded = copy.deepcopy(exact)
    for weight in rounded.parameters():
        weight.data = weight.data.bfloat16()
    tower = tower_of(truth).bfloat16()
    # The convolution sums in another order than the linear; what follows must round alike.
    rounded.patch_embed.forward = tower.patch_embed.forward
    patches = patches_of((1, 10, 14), 2).bfloat16()
    expected, theirs = (
        model(values, grid_thw=torch.tensor([[1, 10, 14]])).pooler_output
        for model, values in ((exact, patches.float()), (rounded, patches))
    )
    ours = tower(patches, 10, 14)
    assert ours.dtype == torch.bfloat16
    rounding = (theirs.float() - expected).square().mean().sqrt()
    assert (ours.float() - theirs.float()).square().mean().sqrt() < 0.3 * rounding


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (1, 1), (5, 7), (9, 4), (6, 6), (2, 11)])
def test_windows_cover_every_cell_once(rows: int, columns: int) -> None:
    order, groups = window_order(rows, columns, 4)
    assert sorted(order) == list(range(rows * columns))
    assert sum(count * size for count, size in groups) == len(order)
    sizes = [size for _, size in groups]
    assert len(set(sizes)) == len(sizes)
    start = 0
    for count, size in groups:
        for _ in range(count):
            window = order[start : start + size]
            start += size
            assert len({(cell // columns // 4, cell % columns // 4) for cell in window}) == 1
