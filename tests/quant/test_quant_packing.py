"""The AWQ bit order against vectors written out by hand, and the arithmetic against its formula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from lowvram.quant import GROUPS, dequantize, pack, quantize, unpack

# By the description of the format: bits 4i to 4i+3 hold output [0, 2, 4, 6, 1, 3, 5, 7][i].
BY_HAND = [
    ([0, 0, 0, 0, 0, 0, 0, 0], 0x00000000),
    ([1, 0, 0, 0, 0, 0, 0, 0], 0x00000001),
    ([0, 1, 0, 0, 0, 0, 0, 0], 0x00010000),
    ([0, 0, 1, 0, 0, 0, 0, 0], 0x00000010),
    ([0, 0, 0, 0, 0, 0, 1, 0], 0x00001000),
    ([0, 0, 0, 0, 0, 0, 0, 8], 0x80000000),
    ([0, 1, 2, 3, 4, 5, 6, 7], 0x75316420),
    ([15, 14, 13, 12, 11, 10, 9, 8], 0x8ACE9BDF),
    ([15] * 8, 0xFFFFFFFF),
]


@pytest.mark.parametrize(("outputs", "word"), BY_HAND)
def test_bit_order(outputs: list[int], word: int) -> None:
    values = np.array([outputs], dtype=np.uint8)
    packed = pack(values)
    assert packed.dtype == np.int32
    assert int(packed.view(np.uint32)[0, 0]) == word
    assert np.array_equal(unpack(packed), values)


def test_eights_follow_each_other_along_the_row() -> None:
    values = np.zeros((2, 24), dtype=np.uint8)
    values[1, 17] = 5
    assert pack(values).tolist() == [[0, 0, 0], [0, 0, 5 << 16]]


@given(
    arrays(np.int32, array_shapes(min_dims=2, max_dims=2, max_side=6)),
)
def test_any_word_survives_unpacking_and_packing(words: np.ndarray) -> None:
    values = unpack(words)
    assert values.shape == (words.shape[0], words.shape[1] * 8) and values.max() <= 15
    assert np.array_equal(pack(values), words)


def test_dequantize_by_hand() -> None:
    # Two groups of 32 inputs, eight outputs; only output 3 of input 40 differs from its zero.
    q = np.full((64, 8), 7, dtype=np.uint8)
    zeros = np.full((2, 8), 7, dtype=np.uint8)
    q[40, 3], zeros[0, 5] = 12, 4
    scales = np.array([[0.5] * 8, [0.25] * 8], dtype=np.float16)
    weights = dequantize(pack(q), pack(zeros), scales, 32)
    expected = np.zeros((64, 8), dtype=np.float32)
    expected[40, 3] = (12 - 7) * 0.25
    expected[:32, 5] = (7 - 4) * 0.5
    assert weights.dtype == np.float32 and np.array_equal(weights, expected)


@given(seed=st.integers(0, 1000), group=st.sampled_from(GROUPS), shift=st.floats(-1, 1))
def test_quantizing_is_off_by_at_most_a_step(seed: int, group: int, shift: float) -> None:
    weight = np.random.default_rng(seed).normal(shift / 4, 1, (16, 2 * group)).astype(np.float32)
    packed = quantize(weight, group)
    assert packed.qweight.shape == (2 * group, 2) and packed.qzeros.shape == (2, 2)
    assert packed.scales.shape == (2, 16) and packed.scales.dtype == np.float16
    step = np.repeat(packed.scales.astype(np.float32), group, axis=0).T
    # Half a step of rounding, and half a step more where the zero point was rounded.
    assert (np.abs(dequantize(*packed, group).T - weight) <= 1.01 * step).all()


def test_what_was_quantized_once_is_not_changed_again() -> None:
    rng = np.random.default_rng(1)
    q = rng.integers(0, 16, (128, 8)).astype(np.uint8)
    q[0], q[1] = 0, 15  # the range of the group is used in full
    scales = rng.uniform(0.01, 0.1, (1, 8)).astype(np.float16)
    zeros = np.full((1, 8), 8, dtype=np.uint8)
    weight = dequantize(pack(q), pack(zeros), scales, 128).T
    again = quantize(weight, 128)
    assert np.array_equal(unpack(again.qweight), q)
    assert np.array_equal(again.scales, scales)
    assert np.array_equal(unpack(again.qzeros), zeros)


@pytest.mark.parametrize(("sign", "zero"), [(1, 0), (-1, 15)])
def test_a_group_on_one_side_of_zero_uses_the_whole_range(sign: int, zero: int) -> None:
    weight = np.tile(np.arange(32, dtype=np.float32) % 16, (8, 1)) * sign
    packed = quantize(weight, 32)
    assert (unpack(packed.qzeros) == zero).all()
    assert np.array_equal(dequantize(*packed, 32).T, weight)


def test_a_group_of_one_value_has_a_step_too() -> None:
    packed = quantize(np.zeros((8, 32), dtype=np.float32), 32)
    assert (packed.scales > 0).all()
    assert np.array_equal(dequantize(*packed, 32), np.zeros((32, 8)))
