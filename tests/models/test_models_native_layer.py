"""A decoder layer of one token in one call: what the operations one by one make of it, to what they
round, on every kind of processor that this one is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from lowvram.config import DecoderConfig
from lowvram.models.kv_cache import KVCache
from lowvram.models.kv_rounded import RoundedKVCache
from lowvram.models.text import DecoderLayer
from lowvram.quant import PlainLinear, QuantLinear, RoundedLinear, kernel_phase
from lowvram.quant.kernels import native, reference
from lowvram.quant.native import Processor, not_offered, processor
from lowvram.quant.native.processors import AVX2, AVX512

OWN = processor()
KINDS = [kind for kind in (AVX512, AVX2) if OWN and kind.needs <= OWN.needs]
if not_offered(1 << 20) is not None:
    KINDS = []

pytestmark = pytest.mark.skipif(not KINDS, reason="nothing is compiled here")

SHAPES = {  # width, inner, query heads, key heads, their width, group
    "grouped": (256, 512, 8, 2, 32, 64),
    "seven to a key head, as in the 7B": (448, 896, 7, 1, 64, 64),
    "of their own": (384, 640, 3, 3, 128, 128),
    "odd": (192, 288, 2, 1, 96, 32),
}

LENGTHS = (0, 1, 3, 15, 127, 128, 129, 300, 5000)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name, autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processor]:
    monkeypatch.setenv("LOWVRAM_NATIVE", "1")  # these are too small for them by themselves
    monkeypatch.setattr(native, "processor", lambda: request.param)
    yield request.param


def packed(inputs: int, outputs: int, bias: bool, group: int) -> nn.Module:
    one = QuantLinear(inputs, outputs, bias, group, dtype=torch.bfloat16)
    one.qweight.random_(-(2**31), 2**31 - 1)
    one.qzeros.fill_(0x77777777)
    one.scales.uniform_(0.5, 1).mul_(0.3 / inputs**0.5)
    return one


def dense(inputs: int, outputs: int, bias: bool, group: int) -> nn.Module:
    one = PlainLinear(inputs, outputs, bias).bfloat16().requires_grad_(False)
    one.weight.normal_(0, inputs**-0.5)
    return one


def rounded(inputs: int, outputs: int, bias: bool, group: int) -> nn.Module:
    weight = torch.randn(outputs, inputs).bfloat16() / inputs**0.5
    one = RoundedLinear(inputs, outputs, bias).bfloat16().requires_grad_(False)
    one.fill_from(lambda start, stop: weight[start:stop], torch.device("cpu"))
    return one


Make = Callable[[int, int, bool, int], nn.Module]

MAKES: dict[str, Make] = {"4 bits": packed, "8 bits": rounded, "16 bits": dense}


def made(shape: str, bits: str = "4 bits", *, loaded: bool = True) -> DecoderLayer:
    width, inner, heads, kv_heads, dim, group = SHAPES[shape]
    torch.manual_seed(width)

    def linear(name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
        of = "16 bits" if bits == "mixed" and name.endswith(("o_proj", "up_proj")) else bits
        one = MAKES["4 bits" if of == "mixed" else of](inputs, outputs, bias, group)
        if bias:
            assert isinstance(one.bias, Tensor)
            one.bias.normal_(0, 0.5)
        return one

    config = DecoderConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        num_hidden_layers=1,
    )
    layer = DecoderLayer(config, linear, "layer", 0)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight = nn.Parameter((torch.rand(width) + 0.5).bfloat16(), requires_grad=False)
    if loaded:
        finish(layer)
    return layer


def finish(layer: nn.Module) -> None:
    for module in layer.modules():
        if callable(hook := getattr(module, "after_load", None)):
            hook()


class Exact(nn.Module):
    """A linear in fp64, of what it holds before it is joined."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        if isinstance(linear, QuantLinear):
            tensors = (linear.qweight, linear.qzeros, linear.scales)
            self.weight = reference.dequantize(*tensors, linear.group_size).double()
        elif isinstance(linear, RoundedLinear):
            steps = linear.get_buffer("scales").double()
            self.weight = linear.get_buffer("packed").double().T * steps
        else:
            self.weight = cast(Tensor, linear.weight).double().T
        bias = cast(Tensor | None, linear.bias)
        self.bias = 0 if bias is None else bias.double()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def exact(layer: DecoderLayer) -> DecoderLayer:
    """That layer, not loaded, in fp64."""
    twin = copy.deepcopy(layer)
    for owner in (twin.self_attn, twin.mlp):
        for name, linear in list(owner.named_children()):
            setattr(owner, name, Exact(linear))
    return twin.double()


def rope(shape: str, place: int) -> tuple[Tensor, Tensor]:
    dim = SHAPES[shape][4]
    angles = place * 1e4 ** (-torch.arange(0, dim, 2) / dim)
    cos, sin = angles.cos(), angles.sin()
    tables = torch.cat((cos, cos)), torch.cat((-sin, sin))
    return tables[0].bfloat16()[None, None, None], tables[1].bfloat16()[None, None, None]


def filled(shape: str, tokens: int, more: int = 3) -> KVCache:
    _, _, _, kv_heads, dim, _ = SHAPES[shape]
    cache = KVCache(1, 1, kv_heads, tokens + more, dim, torch.bfloat16, "cpu")
    torch.manual_seed(tokens)
    cache.data.normal_()
    return cache


def twin(cache: KVCache, dtype: torch.dtype = torch.bfloat16) -> KVCache:
    _, _, batch, kv_heads, tokens, dim = cache.data.shape
    other = KVCache(1, batch, kv_heads, tokens, dim, dtype, "cpu")
    other.data.copy_(cache.data)
    return other


def one_by_one(layer: DecoderLayer, *given: object) -> Tensor:
    """As it is computed where no call does all of it."""
    offered, layer._offered = layer._offered, False
    try:
        return decoded(layer, *given)
    finally:
        layer._offered = offered


def decoded(layer: DecoderLayer, *given: object) -> Tensor:
    with torch.inference_mode(), kernel_phase("decode"):
        out: Tensor = layer(*given)
        return out


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("bits", [*MAKES, "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_what_the_operations_one_by_one_make(shape: str, bits: str) -> None:
    unloaded = made(shape, bits, loaded=False)
    layer, precise = made(shape, bits), exact(unloaded)
    errors = []
    for tokens in LENGTHS:
        cache, turns = filled(shape, tokens), rope(shape, tokens)
        other, wide = twin(cache), twin(cache, torch.float64)
        x = torch.randn(1, 1, SHAPES[shape][0]).bfloat16()
        found = decoded(layer, x, turns, cache, tokens)
        assert layer._native is not None
        wanted = one_by_one(layer, x, turns, other, tokens)
        true = decoded(precise, x.double(), tuple(t.double() for t in turns), wide, tokens)
        # The same keys and values, in the same place and in no other; products of 16 bits are not
        # summed in torch's order.
        apart = 0.01 if bits in ("16 bits", "mixed") else 0
        torch.testing.assert_close(cache.data, other.data, rtol=apart, atol=apart)
        mask = torch.arange(tokens + 3) != tokens
        assert torch.equal(cache.data[..., mask, :], other.data[..., mask, :])
        errors.append((error(found, true), error(wanted, true)))
        assert errors[-1][0] < 0.01, tokens
    own, others = (sum(each) for each in zip(*errors, strict=True))
    assert own < 1.1 * others


def test_attention_that_sees_one_key_above_all_is_its_value() -> None:
    """Scores far apart, in spans that are joined: nothing overflows, no other value stays."""
    shape, tokens = "grouped", 700
    layer = made(shape)
    for linear in (layer.self_attn.q_proj,):
        assert isinstance(linear, QuantLinear) and linear.bias is not None
        linear.get_buffer("scales_and_zeros").zero_()  # outputs are the biases
        linear.bias.fill_(30)
    cache = filled(shape, tokens)
    cache.data[0, 0] = -30
    cache.data[0, 0, :, :, 333] = 30
    x, turns = torch.zeros(1, 1, 256).bfloat16(), rope(shape, 0)
    other = twin(cache)
    found = decoded(layer, x, turns, cache, tokens)
    assert torch.isfinite(found).all()
    assert error(found, one_by_one(layer, x, turns, other, tokens).double()) < 0.01


@pytest.mark.parametrize("tokens", [0, 130, 900])
def test_threads_change_nothing(tokens: int) -> None:
    layer, before, found = made("grouped"), torch.get_num_threads(), []
    x, turns = torch.randn(1, 1, 256).bfloat16(), rope("grouped", tokens)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(decoded(layer, x, turns, filled("grouped", tokens), tokens))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_is_no_number_stays_so() -> None:
    layer, turns = made("odd"), rope("odd", 5)
    x = torch.randn(1, 1, 192).bfloat16()
    x[..., 7] = torch.nan
    assert decoded(layer, x, turns, filled("odd", 5), 5).isnan().all()


def test_other_work_is_done_one_by_one() -> None:
    layer, turns = made("grouped"), rope("grouped", 4)
    x = torch.randn(1, 1, 256).bfloat16()
    decoded(layer, x, turns, filled("grouped", 4), 4)

    def refuse(*given: object) -> Tensor:
        raise AssertionError(f"in one call: {given}")

    layer._native = refuse  # type: ignore[assignment]
    rounded = RoundedKVCache(1, 1, 2, 8, 32, torch.bfloat16, "cpu")
    decoded(layer, x, turns, rounded, 0)
    with torch.inference_mode():
        layer(x, turns, filled("grouped", 4), 4)  # of a prompt
    two = torch.cat((x, x), 1)
    decoded(layer, two, tuple(torch.cat((t, t), 1) for t in turns), filled("grouped", 4), 4)
    with pytest.raises(AssertionError, match="in one call"):
        decoded(layer, x, turns, filled("grouped", 4), 4)


def test_weights_that_go_are_not_read_again() -> None:
    layer, turns = made("grouped"), rope("grouped", 0)
    x = torch.randn(1, 1, 256).bfloat16()
    before = decoded(layer, x, turns, filled("grouped", 0), 0)
    assert layer._native is not None
    layer.as_built()
    assert layer._native is None
    layer.after_load()
    assert torch.equal(before, decoded(layer, x, turns, filled("grouped", 0), 0))
    assert layer._native is not None


@pytest.mark.parametrize("bits", ["4 bits", "16 bits", "mixed"])
def test_a_layer_that_streams_is_read_where_it_now_is(bits: str) -> None:
    """And gives every bit of one that stays."""
    staying, layer = made("grouped", bits), made("grouped", bits, loaded=False)
    turns, found = rope("grouped", 9), []
    x = torch.randn(1, 1, 256).bfloat16()
    for _ in range(3):
        found.append(decoded(layer, x, turns, filled("grouped", 9), 9))
        assert layer._native is None
        for linear in (*layer.self_attn.children(), *layer.mlp.children()):
            for name, old in [*linear.named_parameters(), *linear.named_buffers()]:
                held = linear._parameters if name in linear._parameters else linear._buffers
                new = old.clone()
                held[name] = nn.Parameter(new, False) if held is linear._parameters else new
                old.zero_()  # the next layer's numbers come there
    assert torch.equal(found[0], decoded(staying, x, turns, filled("grouped", 9), 9))
    assert all(torch.equal(found[0], other) for other in found)


def test_layers_that_are_not_all_compiled_are_computed_one_by_one() -> None:
    layer, turns = made("grouped", "16 bits"), rope("grouped", 0)
    x = torch.randn(1, 1, 256).bfloat16()

    class Doubled(nn.Linear):  # none that is known
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    before = decoded(layer, x, turns, filled("grouped", 0), 0)
    assert layer._native is not None
    layer.as_built()
    layer.self_attn.o_proj.__class__ = Doubled
    assert not torch.equal(before, decoded(layer, x, turns, filled("grouped", 0), 0))
    assert layer._native is None


def test_places_that_are_not_there_are_refused() -> None:
    layer, turns = made("grouped"), rope("grouped", 0)
    x, cache = torch.randn(1, 1, 256).bfloat16(), filled("grouped", 4, more=0)
    with pytest.raises(ValueError, match="row 4 of keys for 4 tokens"):
        decoded(layer, x, turns, cache, 4)
    assert layer._native is not None
    with pytest.raises(TypeError, match="wanted rows of bfloat16"):
        layer._native(x.float(), turns, *cache.layer(0), 3)
