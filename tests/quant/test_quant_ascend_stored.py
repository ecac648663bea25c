"""Ascend's 4-bit product on the tensors of the file: every number is that of a layer that stays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from simdevice import operator
from torch import Tensor

from lowvram.quant import Scratch, pack, scratch_bytes, sizes
from lowvram.quant.kernels import Problem, ascend, ascend_stored, reference
from lowvram.quant.kernels.words import as_stored

RNG = np.random.default_rng(13)
TYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    with operator.defined("CPU"):
        yield


def stored(inputs: int, outputs: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    q = RNG.integers(0, 16, (inputs, outputs), dtype=np.uint8)
    zeros = RNG.integers(0, 16, (inputs // group, outputs), dtype=np.uint8)
    steps = (0.5 + RNG.random((inputs // group, outputs))).astype(np.float16)
    return torch.from_numpy(pack(q)), torch.from_numpy(pack(zeros)), torch.from_numpy(steps)


def both(
    x: Tensor, tensors: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, group: int
) -> tuple[Tensor, Tensor]:
    """As it arrives, and where it stays."""
    before = [tensor.clone() for tensor in tensors]
    scratch = Scratch()
    held = reference.prepare(*tensors, group)
    arrived = ascend_stored.run(x, held, bias, group, "decode", scratch)
    assert all(torch.equal(one, other) for one, other in zip(before, tensors, strict=True))
    inputs, outputs = tensors[0].shape[0], tensors[2].shape[1]
    assert 0 < scratch.nbytes <= scratch_bytes(inputs, outputs, "reference", group)
    held = ascend.prepare(*before, group, dtype=x.dtype)
    return arrived, ascend.run(x, held, bias, group, "decode", scratch)


@TYPES
@pytest.mark.parametrize("shape", [(256, 64, 128), (128, 72, 32), (64, 8, 64)])
def test_a_layer_computes_the_same_where_it_stays_and_as_it_arrives(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    tensors = stored(*shape)
    for rows in (1, 6):
        x = torch.randn(rows, shape[0]).to(dtype)
        for bias in (None, torch.randn(shape[1]).to(dtype)):
            arrived, stays = both(x, tensors, bias, shape[2])
            assert arrived.dtype == dtype and torch.equal(arrived, stays)


@TYPES
def test_pieces_of_outputs_and_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = stored(96, 72, 32)
    x, bias = torch.randn(7, 96).to(dtype), torch.randn(72).to(dtype)
    monkeypatch.setattr(ascend_stored, "_PIECE_WEIGHTS", 96 * 32)
    monkeypatch.setitem(sizes.PIECE_WEIGHTS, "ascend", 3 * 32)
    operator.calls.clear()
    arrived, _ = both(x, tensors, bias, 32)
    in_pieces = [(n, 96, 32) for n in (3, 3, 1)] * 2 + [(7, 96, 8)]
    assert operator.calls == [*in_pieces, (7, 96, 72)]
    monkeypatch.undo()
    assert torch.equal(arrived, both(x, tensors, bias, 32)[1])


def test_no_product_is_wider_than_the_operator_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ascend_stored._step(64, 152_064) == 65_528
    assert ascend_stored._step(3584, 18_944) == 4680
    assert ascend_stored._step(3584, 512) == 512
    tried: list[int] = []
    monkeypatch.setattr(ascend, "refusal", lambda problem: tried.append(problem.outputs))
    assert ascend_stored.refusal(Problem("npu", torch.float16, 3584, 18_944, 128)) is None
    assert sorted(tried) == [224, 4680]
    monkeypatch.setattr(ascend, "refusal", lambda problem: "no")
    assert ascend_stored.refusal(Problem("npu", torch.float16, 64, 8, 32)) == "no"


def test_nibbles_in_the_order_of_the_file() -> None:
    words = torch.tensor([[0x7654_3210, -0x7654_3211]], dtype=torch.int32)
    assert as_stored(words).tolist() == [[*range(8), *range(15, 7, -1)]]
    assert as_stored(words[:, 1:]).tolist() == [[*range(15, 7, -1)]]


@pytest.mark.parametrize("scale", [0.0, 6e-8, 4300.0, 1e30])
def test_extreme_scales_are_treated_alike(scale: float) -> None:
    """The last is beyond float16, and becomes its largest number rather than infinity."""
    words, zeros, scales = stored(128, 64, 32)
    scales = torch.full_like(scales, scale, dtype=torch.bfloat16 if scale > 1e5 else None)
    scales[1::2] = 0
    x = torch.randn(3, 128).half() / 4096
    x[1] = 0
    arrived, stays = both(x, (words, zeros, scales), None, 32)
    assert torch.equal(arrived, stays) or scale > 1e5
    if scale < 1e5:
        assert torch.isfinite(arrived).all() and not arrived[1].any()
    assert torch.isfinite(ascend.in_type(scales, torch.float16)).all()
