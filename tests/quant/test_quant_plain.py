"""What is not packed: a token's row goes through the compiled kernels, all else does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram.quant import PlainLinear, kernel_phase, native_layers
from lowvram.quant.kernels import native
from lowvram.quant.native import Processor, not_offered, processor
from lowvram.quant.native.processors import AVX2, AVX512

OWN = processor()
KINDS = [kind for kind in (AVX512, AVX2) if OWN and kind.needs <= OWN.needs]
if not_offered(1 << 20) is not None:
    KINDS = []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the rows that the compiled kernels have multiplied."""
    seen: list[tuple[int, ...]] = []
    product = native.product_of_16_bits

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(x.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(native, "product_of_16_bits", counted)
    monkeypatch.setenv("LOWVRAM_NATIVE", "1")  # these are too small for them by themselves
    yield seen


def linear(inputs: int, outputs: int, bias: bool) -> PlainLinear:
    torch.manual_seed(inputs + outputs)
    return PlainLinear(inputs, outputs, bias).bfloat16().requires_grad_(False)


def decoded(one: PlainLinear, x: Tensor) -> Tensor:
    with kernel_phase("decode"), torch.inference_mode():
        out: Tensor = one(x)
        return out


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (896, 128), (112, 8448), (3584, 48)])
def test_a_row_is_rounded_once(
    inputs: int,
    outputs: int,
    bias: bool,
    kind: Processor,
    calls: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "processor", lambda: kind)
    one = linear(inputs, outputs, bias)
    x = torch.randn(1, 1, inputs).bfloat16()
    exact = F.linear(x.double(), one.weight.double(), one.bias.double() if bias else None)
    found = decoded(one, x)
    assert found.shape == (1, 1, outputs) and calls == [(1, 1, inputs)]
    torch.testing.assert_close(found, exact.bfloat16(), rtol=2**-8, atol=1e-5)
    assert (found == exact.bfloat16()).float().mean() > 0.97
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(decoded(one, x), found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_sums_that_float32_holds_are_exact(
    kind: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "processor", lambda: kind)
    for inputs in (32, 208, 4096):
        weight = torch.randint(-8, 9, (64, inputs)).bfloat16()
        x = torch.randint(-3, 4, (1, inputs)).bfloat16()
        bias = torch.randint(-9, 9, (64,)).bfloat16()
        wanted = (x.float() @ weight.float().T + bias.float()).bfloat16()
        assert torch.equal(native.product_of_16_bits(x, weight, bias), wanted)


def test_everything_else_is_torchs(calls: list[tuple[int, ...]]) -> None:
    one = linear(64, 32, True)
    row = torch.randn(1, 64).bfloat16()
    assert torch.equal(one(row), F.linear(row, one.weight, one.bias))  # of a prompt
    decoded(one, torch.randn(2, 64).bfloat16())
    wide = PlainLinear(64, 32)
    assert torch.equal(decoded(wide, row.float()), F.linear(row.float(), wide.weight, wide.bias))
    decoded(linear(40, 32, False), torch.randn(1, 40).bfloat16())  # in no lanes of 16
    assert one.to("meta")(torch.empty(1, 64, dtype=torch.bfloat16, device="meta")).is_meta
    assert calls == []


def test_small_linears_and_other_switches_build_nothing(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(1, 1024).bfloat16()
    monkeypatch.setenv("LOWVRAM_NATIVE", "0")
    decoded(linear(1024, 512, False), x)
    monkeypatch.delenv("LOWVRAM_NATIVE")
    decoded(linear(1024, 128, False), x)
    assert calls == []
    decoded(linear(1024, 512, False), x)
    assert len(calls) == bool(KINDS)


def test_addresses_are_given_only_of_what_fits() -> None:
    weight = torch.randn(32, 64).bfloat16()
    row = torch.randn(1, 64).bfloat16()
    for x, held, bias in (
        (row.float(), weight, None),
        (torch.cat((row, row)), weight, None),
        (row, weight.float(), None),
        (row, weight.T.contiguous().T, None),
        (row, weight, torch.randn(32)),
    ):
        with pytest.raises(TypeError, match="wanted"):
            native.product_of_16_bits(x, held, bias)


def test_a_plan_says_how_a_token_goes_through_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_layers("cuda", "bfloat16", 2048, 11008) is None
    assert native_layers("cpu", "float32", 2048, 11008) is None
    small = native_layers("cpu", "bfloat16", 64, 128)
    assert small is not None and "operation by operation" in small.reason
    large = native_layers("cpu", "bfloat16", 2048, 11008)
    assert large is not None and (large.name == "native") == bool(KINDS)
    monkeypatch.setenv("LOWVRAM_NATIVE", "0")
    off = native_layers("cpu", "bfloat16", 2048, 11008)
    assert off is not None and off.reason.endswith("LOWVRAM_NATIVE=0")
