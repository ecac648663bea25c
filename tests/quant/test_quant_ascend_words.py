"""Words of eight 4-bit integers, taken apart without shifts and put in order."""

from __future__ import annotations

import numpy as np
import pytest
import simdevice as sim
import torch
from simdevice import simulated

from lowvram.quant import pack, unpack
from lowvram.quant.kernels import reference
from lowvram.quant.kernels.words import in_order, into_floats

RNG = np.random.default_rng(7)


@pytest.mark.parametrize("shape", [(1, 8), (3, 40), (64, 96)])
def test_floats_are_the_integers_of_the_file(shape: tuple[int, int]) -> None:
    q = RNG.integers(0, 16, shape, dtype=np.uint8)
    values = torch.empty(shape)
    into_floats(torch.from_numpy(pack(q)), values, torch.empty(shape))
    assert np.array_equal(values.numpy(), q.astype(np.float32))


def test_some_columns_of_a_matrix() -> None:
    q = RNG.integers(0, 16, (5, 48), dtype=np.uint8)
    values = torch.empty(5, 16)
    into_floats(torch.from_numpy(pack(q))[:, 2:4], values, torch.empty(5, 16))
    assert np.array_equal(values.numpy(), q[:, 16:32].astype(np.float32))


def test_every_word_is_put_in_order() -> None:
    words = torch.from_numpy(RNG.integers(-(2**31), 2**31, (50, 4)).astype(np.int32))
    q = unpack(words.numpy()).reshape(50, 4, 8).astype(np.uint32)
    wanted = np.bitwise_or.reduce(q << np.arange(0, 32, 4, dtype=np.uint32), axis=-1)
    assert np.array_equal(in_order(words).numpy().view(np.uint32), wanted)


@simulated
def test_the_reference_needs_no_shift_on_an_npu() -> None:
    """The simulated device refuses shifts; the values are the CPU's, bit for bit."""
    sim.reset()
    sim.configure(limit=1 << 30, context=0)
    stored = (
        torch.from_numpy(RNG.integers(-(2**31), 2**31, (128, 24)).astype(np.int32)),
        torch.from_numpy(RNG.integers(-(2**31), 2**31, (2, 24)).astype(np.int32)),
        torch.from_numpy(RNG.standard_normal((2, 192)).astype(np.float16)),
    )
    found = reference.dequantize(*(tensor.to("npu") for tensor in stored), 64)
    assert torch.equal(found.cpu(), reference.dequantize(*stored, 64))
    assert sim.host_operators() == {}
