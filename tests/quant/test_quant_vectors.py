"""The layout against what AutoAWQ 0.2.9 itself packed (`data/make_vectors.py`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowvram.quant import QuantLinear, dequantize, pack, unpack
from lowvram.quant.search_grid import Coded, Grid, full_range, nearest

CASES = {"g32": 32, "g64": 64, "g128": 128}
STORED = ("qweight", "qzeros", "scales")


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "data" / "autoawq.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_reading(vectors: dict[str, Tensor], case: str) -> None:
    qweight, qzeros, scales = (vectors[f"{case}.{name}"].numpy() for name in STORED)
    ours = dequantize(qweight, qzeros, scales, CASES[case])
    # The package multiplies in float16.
    assert np.array_equal(ours.astype(np.float16), vectors[f"{case}.dense"].numpy())
    assert np.array_equal(pack(unpack(qweight)), qweight)
    assert np.array_equal(pack(unpack(qzeros)), qzeros)


@pytest.mark.parametrize("case", CASES)
def test_writing(vectors: dict[str, Tensor], case: str) -> None:
    zeros = torch.from_numpy(unpack(vectors[f"{case}.qzeros"].numpy())).T.float()
    grid = Grid(vectors[f"{case}.scales"].T.float(), zeros)
    on_grid = vectors[f"{case}.dense"].T.float().contiguous()
    stored = Coded(nearest(on_grid, grid), grid).stored()
    for name in STORED:
        assert torch.equal(stored[name], vectors[f"{case}.{name}"]), name


@pytest.mark.parametrize("case", CASES)
def test_full_range_is_the_package_s_where_a_group_has_both_signs(
    vectors: dict[str, Tensor], case: str
) -> None:
    weight = vectors[f"{case}.weight"].float()
    grid = full_range(weight, CASES[case])
    zeros = torch.from_numpy(unpack(vectors[f"{case}.qzeros"].numpy())).T.float()
    steps = vectors[f"{case}.scales"].T.float()
    mixed = torch.arange(3, len(weight))
    assert torch.allclose(grid.steps[mixed], steps[mixed], rtol=1e-3)
    assert (grid.zeros[mixed] == zeros[mixed]).float().mean() > 0.9


@pytest.mark.parametrize("case", CASES)
def test_linear(vectors: dict[str, Tensor], case: str) -> None:
    dense, bias = vectors[f"{case}.dense"].float(), vectors[f"{case}.bias"].float()
    linear = QuantLinear(*dense.shape, True, CASES[case])
    held = {name: vectors[f"{case}.{name}"] for name in (*STORED, "bias")}
    linear.load_state_dict(held)
    x = torch.randn(5, dense.shape[0], generator=torch.Generator().manual_seed(1))
    # The package's own values are rounded to float16 once more than ours.
    assert torch.allclose(linear(x), x @ dense + bias, rtol=2e-3, atol=2e-3)
