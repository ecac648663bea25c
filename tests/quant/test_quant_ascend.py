"""Ascend's 4-bit product: the layout by hand, the formula, the limits. The operator is emulated."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from simdevice import operator
from torch import Tensor

from lowvram.quant import Problem, Scratch, dequantize, linear_bytes, pack, sizes
from lowvram.quant.kernels import ascend

RNG = np.random.default_rng(11)
BOUND = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
TYPES = pytest.mark.parametrize("dtype", BOUND, ids=str)


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    with operator.defined("CPU"):
        yield


def stored(
    inputs: int, outputs: int, group: int, scale: float = 0.02
) -> tuple[Tensor, Tensor, Tensor]:
    """Random words, zero points and scales, as a file holds them."""
    q = RNG.integers(0, 16, (inputs, outputs), dtype=np.uint8)
    zeros = RNG.integers(0, 16, (inputs // group, outputs), dtype=np.uint8)
    steps = scale * (0.5 + RNG.random((inputs // group, outputs))).astype(np.float16)
    return torch.from_numpy(pack(q)), torch.from_numpy(pack(zeros)), torch.from_numpy(steps).half()


def exact(tensors: tuple[Tensor, Tensor, Tensor], group: int) -> Tensor:
    """`(q - zero) * scale` by numpy, [K, N] in float64."""
    words, zeros, scales = (tensor.numpy() for tensor in tensors)
    return torch.from_numpy(dequantize(words, zeros, scales, group)).double()


def product(
    x: Tensor, tensors: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, group: int
) -> Tensor:
    copies = [tensor.clone() for tensor in tensors]  # words are turned where they lie
    held = ascend.prepare(*copies, group, dtype=x.dtype)
    return ascend.run(x, held, bias, group, "decode", Scratch())


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def word(unsigned: int) -> int:
    return unsigned - (1 << 32 if unsigned >> 31 else 0)


def test_the_emulation_on_a_layout_written_by_hand() -> None:
    """Two inputs, eight outputs: -8, -1, 0, 7, 1, 2, 3, 4 and 5, -3, 2, -8, 7, 0, -1, 6."""
    weight = torch.tensor([[word(0x4321_70F8)], [word(0x6F07_82D5)]], dtype=torch.int32)
    assert operator.signed(weight).tolist() == [
        [-8, -1, 0, 7, 1, 2, 3, 4],
        [5, -3, 2, -8, 7, 0, -1, 6],
    ]
    out = torch.ops.npu.npu_weight_quant_batchmatmul(
        torch.tensor([[1.0, 0.0], [2.0, -1.0]], dtype=torch.float16),
        weight,
        torch.tensor([[1, 1, 2, 0.5, 1, 1, 1, 0.25]], dtype=torch.float16),
        torch.tensor([[8, 0, 1, -7, 0, 0, 0, 4]], dtype=torch.float16),
        bias=torch.tensor([0, 0, 0, 0, 100, 0, 0, 0], dtype=torch.float16),
    )
    # Row 0: (weight + offset) * scale of input 0; row 1: twice that less the same of input 1.
    assert out.tolist() == [
        [0, -1, 2, 0, 101, 2, 3, 2],
        [-13, 1, -2, 7.5, 95, 4, 7, 1.5],
    ]


def test_a_word_of_the_file_becomes_the_word_of_the_operator() -> None:
    """Outputs 0..7 hold q = 0..7 in the one row and 15..8 in the other; zero points are 7..0."""
    words = torch.tensor([[word(0x7531_6420)], [word(0x8ACE_9BDF)]] * 16, dtype=torch.int32)
    zeros = torch.tensor([[word(0x0246_1357)]], dtype=torch.int32)
    scales = torch.arange(1, 9).half()[None] / 8
    held = ascend.prepare(words, zeros, scales, 32, dtype=torch.bfloat16)
    packed = held["packed"]
    assert packed.data_ptr() == words.data_ptr()  # nothing is held twice, even while it is made
    assert packed[:2].flatten().tolist() == [word(0xFEDC_BA98), 0x0123_4567]
    steps, offsets = held["scales_and_offsets"]
    assert steps.dtype == torch.bfloat16 and torch.equal(steps.float(), scales.float())
    assert offsets.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


@TYPES
@pytest.mark.parametrize("shape", [(256, 64, 128), (128, 72, 32), (192, 8, 64), (64, 40, 64)])
def test_agrees_with_the_formula(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs, outputs, group = shape
    tensors = stored(*shape)
    weights = exact(tensors, group)
    generator = torch.Generator().manual_seed(outputs)
    for rows in (1, 5):
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        bias = torch.randn(outputs, generator=generator).to(dtype)
        plain = product(x, tensors, None, group)
        assert plain.dtype == dtype and error(plain, x.double() @ weights) < BOUND[dtype]
        biased = product(x, tensors, bias, group)
        assert error(biased, x.double() @ weights + bias.double()) < BOUND[dtype]
    assert operator.calls[-1] == (5, inputs, outputs)


@TYPES
def test_wide_outputs_go_in_pieces_and_change_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = stored(96, 520, 32)
    x = torch.randn(7, 96).to(dtype)
    bias = torch.randn(520).to(dtype)
    whole = product(x, tensors, bias, 32)
    monkeypatch.setattr(ascend, "MOST", 200)
    monkeypatch.setattr(operator, "MOST", 200)
    monkeypatch.setitem(sizes.PIECE_WEIGHTS, "ascend", 3 * 192)
    pieces = ascend.column_pieces(520)
    assert [(one.start, one.stop) for one in pieces] == [(0, 192), (192, 384), (384, 520)]
    assert ascend._trial(Problem("cpu", dtype, 96, 520, 32)) is None
    operator.calls.clear()
    assert torch.equal(product(x, tensors, bias, 32), whole)
    # Results of one piece of columns and some rows at a time, never wider than planned.
    assert operator.calls == [(n, 96, 192) for n in (3, 3, 1)] * 2 + [(n, 96, 136) for n in (4, 3)]
    assert product(x[:0], tensors, bias, 32).shape == (0, 520)
    monkeypatch.setattr(ascend, "MOST", 65_535)
    assert product(x[:0], tensors, bias, 32).shape == (0, 520)


def test_a_head_is_wider_than_one_product() -> None:
    pieces = ascend.column_pieces(152_064)
    assert [one.stop - one.start for one in pieces] == [50_688] * 3
    assert len(ascend.column_pieces(65_528)) == 1
    assert [one.stop for one in ascend.column_pieces(65_536)] == [32_768, 65_536]
    tensors = stored(64, 65_600, 32)
    x = torch.randn(2, 64).half()
    found = product(x, tensors, None, 32)
    assert error(found, x.double() @ exact(tensors, 32)) < BOUND[torch.float16]
    assert {call[2] for call in operator.calls} == {32_832, 32_768}


@TYPES
@pytest.mark.parametrize("shape", [(256, 64, 128), (96, 136, 32)])
def test_what_is_held_is_what_is_planned(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = ascend.prepare(*stored(*shape), shape[2], dtype=dtype)
    assert sum(tensor.nbytes for tensor in held.values()) == linear_bytes(*shape, "ascend")
    monkeypatch.setattr(ascend, "MOST", 64)
    held = ascend.prepare(*stored(*shape), shape[2], dtype=dtype)
    assert sum(tensor.nbytes for tensor in held.values()) == linear_bytes(*shape, "ascend")


@TYPES
@pytest.mark.parametrize("scale", [0.0, 6e-8, 1e-6, 60.0, 4300.0])
def test_extreme_scales_make_no_nan(dtype: torch.dtype, scale: float) -> None:
    """From none over the least that float16 knows to the largest whose weights it still knows."""
    words, zeros, scales = stored(128, 64, 32)
    scales.fill_(scale)
    scales[1::2] = 0  # and groups that are all zero between them
    tensors = words, zeros, scales
    x = torch.randn(3, 128).to(dtype) / 1024
    x[1] = 0
    out = product(x, tensors, None, 32)
    wanted = x.double() @ exact(tensors, 32)
    assert torch.isfinite(out).all() and not out[1].any()
    # float16 has no more than this between two numbers near zero.
    assert (out.double() - wanted).abs().max() <= 2 * BOUND[dtype] * wanted.abs().max() + 2**-24


def test_scales_beyond_float16_stay_finite() -> None:
    words, zeros, _ = stored(64, 8, 32)
    scales = torch.full((2, 8), 1e30, dtype=torch.bfloat16)
    held = ascend.prepare(words, zeros, scales, 32, dtype=torch.float16)
    assert held["scales_and_offsets"][0].unique().tolist() == [65504]
