"""Shared scratch, joined linears, and tinygemm's order of weights, emulated without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowvram.quant import QuantLinear, Scratch, apply_all, join, kernel_phase, quantize, sizes
from lowvram.quant.kernels import tinygemm
from lowvram.quant.kernels.pieces import scales_and_offsets
from lowvram.quant.kernels.reference import dequantize, unpack


def packed(inputs: int, outputs: int, seed: int, **options: object) -> QuantLinear:
    rng = np.random.default_rng(seed)
    made = quantize(rng.standard_normal((outputs, inputs)).astype(np.float32), 64)
    layer = QuantLinear(inputs, outputs, True, 64, **options)  # type: ignore[arg-type]
    for name, value in zip(("qweight", "qzeros", "scales"), made, strict=True):
        layer.get_buffer(name).copy_(torch.from_numpy(value))
    bias = torch.from_numpy(rng.standard_normal(outputs).astype(np.float32))
    layer.get_buffer("bias").copy_(bias)
    return layer


def test_scratch_is_one_buffer_that_grows_and_is_given_back() -> None:
    told: list[int] = []
    scratch = Scratch(lambda buffer: told.append(0 if buffer is None else buffer.nbytes))
    cpu = torch.device("cpu")
    one, other = scratch.take(cpu, ((3, 5), torch.float32), ((7,), torch.uint8))
    assert one.shape == (3, 5) and one.dtype == torch.float32 and other.shape == (7,)
    one.fill_(1.0), other.fill_(9)
    assert (one == 1).all() and (other == 9).all()  # they do not overlap
    again = scratch.take(cpu, ((2,), torch.float32))[0]
    assert again.data_ptr() == one.data_ptr() and told == [128]
    scratch.take(cpu, ((100,), torch.float32))
    assert told == [128, 0, 448] and scratch.nbytes == 448
    scratch.free(), scratch.free()
    assert told == [128, 0, 448, 0] and scratch.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linears_share_scratch_and_take_no_more_than_is_planned(dtype: torch.dtype) -> None:
    scratch = Scratch()
    linears = [packed(128, n, n, dtype=dtype, scratch=scratch) for n in (64, 192)]
    x = torch.randn(3, 128).to(dtype)
    for linear in linears:
        linear.after_load()
        alone = packed(128, linear.out_features, linear.out_features, dtype=dtype)
        alone.after_load()
        assert torch.equal(linear(x), alone(x))
        assert alone.scratch is not scratch and alone.scratch.nbytes
    kernel = linears[0].kernel.name
    assert 0 < scratch.nbytes <= sizes.scratch_bytes(128, 192, kernel)


class Three(nn.Module):
    def __init__(self, scratch: Scratch) -> None:
        super().__init__()
        options = {"dtype": torch.bfloat16, "scratch": scratch}
        self.linears = nn.ModuleList(packed(128, n, n, **options) for n in (128, 64, 64))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_joined_linears_compute_what_they_did_apart(phase: str) -> None:
    joined, apart = Three(Scratch()), Three(Scratch())
    for linear in apart.linears:
        linear.after_load()
    before = sum(b.nbytes for b in apart.buffers())
    join(joined.linears)
    for linear in joined.linears:  # as the loader does, children after their parent
        linear.after_load()
    assert joined.linears[0].joined == (128, 64, 64)
    assert sum(b.nbytes for b in joined.buffers()) == before  # nothing is held twice
    x = torch.randn(2, 5, 128).bfloat16()
    with kernel_phase(phase):  # type: ignore[arg-type]
        found, wanted = apply_all(joined.linears, x), apply_all(apart.linears, x)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=8e-3, atol=1e-3)
        assert (one == other).float().mean() > 0.99


def test_what_gains_nothing_is_left_apart() -> None:
    dense = [nn.Linear(128, 8), nn.Linear(128, 8)]
    join(dense)
    assert len(apply_all(dense, torch.randn(1, 128))) == 2
    exact = [packed(128, 8, 0), packed(128, 8, 1)]
    join(exact)
    assert exact[0].kernel.name == "reference" and not exact[0].joined
    mixed = [packed(128, 64, 0, dtype=torch.bfloat16), nn.Linear(128, 8, dtype=torch.bfloat16)]
    join(mixed)
    assert not mixed[0].joined  # type: ignore[union-attr]


def emulated_pack(pairs: Tensor, tiles: int) -> Tensor:
    """`aten::_convert_weight_to_int4pack` on CUDA, word by word, after its published source."""
    outputs, inputs = pairs.shape[0], pairs.shape[1] * 2
    q = torch.stack((pairs >> 4, pairs & 15), dim=-1).view(outputs, inputs).tolist()
    out = torch.zeros(outputs // 8, inputs // (16 * tiles), 32, tiles // 2, dtype=torch.int64)
    for n_tile, k_outer, lane, half in np.ndindex(*out.shape):
        row = q[n_tile * 8 + lane // 4]
        first = (k_outer * tiles + 2 * half) * 16 + lane % 4 * 2
        v = [row[first + tile + step] for tile in (0, 16) for step in (0, 1, 8, 9)]
        word = 0
        for place in (7, 5, 3, 1, 6, 4, 2, 0):
            word = word << 4 | v[place]
        out[n_tile, k_outer, lane, half] = word - (1 << 32 if word >> 31 else 0)
    return out.to(torch.int32)


def emulated_mm(x: Tensor, weights: Tensor, group: int, pairs: Tensor) -> Tensor:
    """`aten::_weight_int4pack_mm`: the same weights as prefill reads back, multiplied."""
    return x @ tinygemm.dequantize(weights, pairs, group, Scratch())


@pytest.mark.parametrize(("inputs", "tiles"), [(256, 8), (192, 4), (96, 2)])
def test_tinygemm_order_is_read_back(inputs: int, tiles: int) -> None:
    assert tinygemm.inner_tiles(inputs) == tiles
    rng = torch.Generator().manual_seed(inputs)
    q = torch.randint(0, 16, (inputs, 24), dtype=torch.int32, generator=rng)
    zeros = torch.randint(0, 16, (inputs // 32, 24), dtype=torch.int32, generator=rng)
    scales = torch.full((inputs // 32, 24), 0.5)
    words = emulated_pack(tinygemm.byte_pairs(q), tiles)
    found = tinygemm.dequantize(words, scales_and_offsets(zeros, scales), 32, Scratch())
    exact = (q - zeros.repeat_interleave(32, 0)).float() * 0.5
    assert torch.equal(found.float(), exact)


def test_tinygemm_op_makes_that_shape() -> None:
    pairs = torch.empty(24, 128, dtype=torch.uint8, device="meta")
    made = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    assert made.shape == emulated_pack(torch.zeros(24, 128, dtype=torch.uint8), 8).shape
    assert made.dtype == torch.int32


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_tinygemm_against_the_formula(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = torch.ops.aten
    monkeypatch.setattr(ops, "_convert_weight_to_int4pack", emulated_pack, raising=False)
    monkeypatch.setattr(ops, "_weight_int4pack_mm", emulated_mm, raising=False)
    monkeypatch.setitem(sizes.PIECE_WEIGHTS, "tinygemm", 128 * 16)  # several pieces
    layer = packed(128, 40, 3, dtype=torch.bfloat16)
    stored = [layer.get_buffer(name) for name in ("qweight", "qzeros", "scales")]
    held = tinygemm.prepare(*stored, 64)
    held_bytes = sum(tensor.nbytes for tensor in held.values())
    assert held_bytes == sizes.linear_bytes(128, 40, 64, "tinygemm")
    x = torch.randn(3, 128).bfloat16()
    scratch = Scratch()
    out = tinygemm.run(x, held, layer.bias, 64, phase, scratch)  # type: ignore[arg-type]
    exact = x.double() @ dequantize(*stored, 64).double() + layer.get_buffer("bias").double()
    assert (out.double() - exact).norm() / exact.norm() < 6e-3
    assert scratch.nbytes <= sizes.scratch_bytes(128, 40, "tinygemm")


def test_unpacking_into_a_given_place() -> None:
    words = torch.randint(-(2**31), 2**31, (4, 3), dtype=torch.int32)
    out = torch.empty(4, 24, dtype=torch.int32)
    assert unpack(words, out) is out and torch.equal(out, unpack(words))
