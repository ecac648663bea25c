"""Triton's kernels interpreted: against `(q - zero) * scale` times the input, in float64.

`test_quant_triton.py` runs these in a process of their own. Where the tiles of the table would take
long to interpret, tiles are as large as a group; the tiles themselves are tested on small shapes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from interpreted import BOUND, Linear, activations, error, linear

from lowvram.quant import Scratch
from lowvram.quant.kernels import eight_bits, triton
from lowvram.quant.sizes import eight_bit_scratch_bytes
from lowvram.quant.triton import products, tuning
from lowvram.specs import SPECS
from lowvram.tensors import thinker_linears

HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger tiles: fewer of them to interpret."""

    def whole_groups(count: int, outputs: int, group: int) -> tuning.Gemv:
        return tuning.Gemv(1 << (count - 1).bit_length(), group, 32, 1)

    monkeypatch.setattr(tuning, "gemv", whole_groups)
    monkeypatch.setattr(tuning, "UNPACK", tuning.Unpack(32, 256))


def true_shapes() -> list[tuple[int, int]]:
    """(inputs, outputs) of every linear of the text layers of the 3B and the 7B."""
    configs = [spec.config.thinker for spec in SPECS.values()]
    found = {dims[:2] for config in configs for dims in thinker_linears(config).values()}
    return sorted(shape for shape in found if shape[0] >= 2048)


def test_the_true_shapes_are_those_of_two_models() -> None:
    assert {inputs for inputs, _ in true_shapes()} == {2048, 11008, 3584, 18944}
    assert len(true_shapes()) == 8


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("inputs", [2048, 3584, 11008, 18944])
def test_all_inputs_of_every_linear_and_a_few_outputs(inputs: int, phase: str, wide: None) -> None:
    """The full shapes are for `benchmarks/triton_shapes.py`."""
    packed = linear(inputs, 64, 128, bias=BRAIN)
    x = activations(1, inputs, BRAIN)
    assert error(packed.found(x, phase), packed.wanted(x)) < BOUND[BRAIN]


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("scales", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_and_types(group: int, scales: torch.dtype, dtype: torch.dtype, wide: None) -> None:
    packed = linear(128, 40, group, scales=scales, bias=dtype)
    for rows, phase in ((1, "decode"), (17, "decode"), (5, "prefill")):
        x = activations(rows, 128, dtype)
        assert error(packed.found(x, phase), packed.wanted(x)) < BOUND[dtype]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 64, 65])
def test_rows(rows: int, wide: None) -> None:
    packed = linear(128, 72, 64, bias=HALF)
    x = activations(rows, 128, HALF)
    found = packed.found(x)
    assert error(found, packed.wanted(x)) < BOUND[HALF]
    if rows > 1:  # a row does not see those beside it
        x[0] = 7.0
        assert torch.equal(packed.found(x)[1:], found[1:])


def test_rows_choose_in_decoding_alone(wide: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In prefill they follow from how a prompt was cut, which must not show."""
    unpacked: list[int] = []
    into = products.unpacked
    monkeypatch.setattr(products, "unpacked", lambda *given: unpacked.append(1) or into(*given))
    packed = linear(64, 32, 32)
    for rows, phase, times in ((1, "prefill", 1), (64, "decode", 0), (65, "decode", 1)):
        packed.found(activations(rows, 64, HALF), phase)
        assert len(unpacked) == times
        unpacked.clear()


@pytest.mark.parametrize(("rows", "group"), [(1, 128), (2, 128), (4, 32), (8, 64), (20, 64)])
def test_the_tiles_of_the_table(rows: int, group: int) -> None:
    packed = linear(128, 264, group, bias=BRAIN)  # a tile of 256 outputs, and eight more
    x = activations(rows, 128, BRAIN)
    assert error(packed.found(x), packed.wanted(x)) < BOUND[BRAIN]


def test_the_wide_tile_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "WIDE", 520)
    assert tuning.gemv(1, 520, 128).words == 64
    packed, x = linear(128, 520, 128), activations(1, 128, HALF)
    assert error(packed.found(x), packed.wanted(x)) < BOUND[HALF]


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_parts_of_the_inputs_are_added_in_order(
    rows: int, wide: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: more processors, more parts, the same but for the last bit."""
    packed, x = linear(128, 64, 32, bias=HALF), activations(rows, 128, HALF)
    found = []
    for processors in (0, 1, 100):
        monkeypatch.setattr(products, "_processors", lambda device, n=processors: n)
        found.append(packed.found(x))
        assert torch.equal(packed.found(x), found[-1])
        assert error(found[-1], packed.wanted(x)) < BOUND[HALF]
    torch.testing.assert_close(found[0], found[2], rtol=2e-3, atol=2e-3)


def test_products_that_are_split_leave_no_more_than_is_planned(wide: None) -> None:
    """The most rows there can be, over the fewest inputs and the smallest groups."""
    for inputs, outputs in ((32, 8), (64, 64), (128, 64)):
        packed, x = linear(inputs, outputs, 32), activations(64, inputs, HALF)
        assert error(packed.found(x), packed.wanted(x)) < BOUND[HALF]


def changed(packed: Linear, **tensors: torch.Tensor) -> Linear:
    return Linear(packed.held | tensors, packed.bias, packed.group)


@pytest.mark.parametrize("zero", [0, 15])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_zero_points_at_both_ends(zero: int, phase: str, wide: None) -> None:
    packed = linear(64, 32, 32)
    words = torch.full_like(packed.held["qzeros"], 0 if zero == 0 else -1)
    packed = changed(packed, qzeros=words)
    sign = 1 if zero == 0 else -1
    assert (packed.weights * sign >= 0).all()
    for rows in (1, 9):
        x = activations(rows, 64, HALF)
        assert error(packed.found(x, phase), packed.wanted(x)) < BOUND[HALF]


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_groups_of_nothing_and_of_the_largest_and_smallest_scales(
    dtype: torch.dtype, phase: str, wide: None
) -> None:
    packed = linear(128, 64, 32, scales=HALF)
    scales = packed.held["scales"].clone()
    scales[1], scales[2], scales[3] = 0.0, 65504.0, 6e-8
    packed = changed(packed, scales=scales)
    for rows in (1, 9):
        x = activations(rows, 128, dtype)
        x[:, 64:96] = 0.0  # what the largest scales belong to
        found = packed.found(x, phase)
        assert found.isfinite().all()
        assert error(found, packed.wanted(x)) < BOUND[dtype]


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("rows", [1, 9])
def test_what_16_bits_cannot_hold_is_infinite_as_in_any_product(
    rows: int, phase: str, wide: None
) -> None:
    """Large inputs, then large weights: never no number. Sums on the way may be larger than what
    comes out."""
    packed = linear(64, 32, 32)
    packed = changed(packed, scales=torch.full_like(packed.held["scales"], 0.03))
    x = torch.full((rows, 64), 60000.0).half()
    x[:, ::2] *= -1
    wanted, found = packed.wanted(x), packed.found(x, phase)
    far = wanted.abs() > 66000
    assert far.any() and not far.all()
    assert torch.equal(found[far].double(), wanted[far].sign() * torch.inf)
    near = wanted.abs() < 65000
    atol = 60000 * 64 * 0.3 * 2**-11  # of prefill's weights, which are rounded
    torch.testing.assert_close(found[near].double(), wanted[near], rtol=1e-3, atol=atol)
    huge = changed(packed, scales=torch.full_like(packed.held["scales"], 65504.0))
    assert not huge.found(x, phase).isnan().any()


def test_joined_linears_give_what_each_gives_alone(wide: None) -> None:
    apart = [linear(128, outputs, 64, bias=HALF, seed=outputs) for outputs in (64, 16, 16)]
    tensors = {
        name: torch.cat([one.held[name] for one in apart], dim=axis)
        for name, axis in triton.JOINS.items()
    }
    bias = torch.cat([one.bias for one in apart if one.bias is not None])
    together = Linear(tensors, bias, 64)
    for rows, phase in ((1, "decode"), (10, "decode"), (3, "prefill")):
        x = activations(rows, 128, HALF)
        alone = torch.cat([one.found(x, phase) for one in apart], dim=1)
        torch.testing.assert_close(together.found(x, phase), alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 12, 65])
def test_gated_is_the_product_of_single_operations(
    rows: int, bias: bool, dtype: torch.dtype, wide: None
) -> None:
    packed = linear(64, 48, 32, bias=dtype if bias else None)
    x = activations(rows, 64, dtype)
    opened, passed = packed.found(x).chunk(2, dim=1)
    wanted = F.silu(opened) * passed
    found = triton.gated(x, packed.held, packed.bias, 32, Scratch())
    assert found.shape == (rows, 24) and found.dtype == dtype
    # Sums are made in the same order: but for an exponential they are the same numbers.
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=1e-6)
    assert (found == wanted).float().mean() > 0.95


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_gated_is_a_number_whatever_overflows(dtype: torch.dtype, sign: int, wide: None) -> None:
    """A gate of minus infinity, whose `silu` would be none; an open gate times zero."""
    packed = linear(64, 48, 32)
    scales = torch.full((2, 48), 65504.0).half()
    scales[:, 36:] = 0.0
    words = torch.full_like(packed.held["qweight"], -1)  # 15 everywhere
    packed = changed(packed, qweight=words, qzeros=torch.zeros_like(packed.held["qzeros"]))
    packed = changed(packed, scales=scales)
    # Sums in fp32 hold either; their products with the scales overflow.
    x = torch.full((1, 64), sign * (65504.0 if dtype == HALF else 2e32)).to(dtype)
    found = triton.gated(x, packed.held, None, 32, Scratch())
    assert not found.isnan().any()
    assert (found[:, 12:] == 0).all()
    assert found[:, :12].isinf().all() if sign > 0 else (found[:, :12] == 0).all()


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9])
@pytest.mark.parametrize(("inputs", "outputs"), [(1000, 40), (64, 9), (2048, 16)])
def test_weights_of_8_bits(inputs: int, outputs: int, rows: int, phase: str) -> None:
    random = torch.Generator().manual_seed(inputs)
    weights = torch.randint(-127, 128, (outputs, inputs), generator=random).to(torch.int8)
    scales = torch.rand(outputs, generator=random).mul_(0.01).bfloat16()
    bias = torch.randn(outputs, generator=random)
    exact = weights.double() * scales.double().unsqueeze(1)
    for dtype in (HALF, BRAIN):
        x, scratch = activations(rows, inputs, dtype), Scratch()
        given = x, weights, scales, bias.to(dtype), phase, scratch
        found = eight_bits.multiply(*given, "triton")  # type: ignore[arg-type]
        wanted = x.double() @ exact.T + bias.to(dtype).double()
        assert found.dtype == dtype and error(found, wanted) < BOUND[dtype]
        assert scratch.nbytes <= eight_bit_scratch_bytes(inputs, outputs)
