"""The compiled kernels against `(q - zero) * scale`, for every kind that this processor is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram.quant import (
    KernelName,
    Problem,
    QuantLinear,
    RoundedHead,
    Scratch,
    apply_all,
    apply_gated,
    head_bytes,
    join,
    kernel_phase,
    linear_bytes,
    preferred_kernel,
    select,
)
from lowvram.quant.kernels import native, native_stored, reference
from lowvram.quant.native import Processor, not_offered, processor
from lowvram.quant.native.processors import AVX2, AVX512, best_of

OWN = processor()
KINDS = [kind for kind in (AVX512, AVX2) if OWN and kind.needs <= OWN.needs]
"""Of processors that can be tried here; none where nothing would be compiled."""

if not_offered(1 << 20) is not None:
    KINDS = []

SHAPES = {  # inputs and, of the outputs, as many as are no multiple of anything but a block
    "3B q, k, v, o, gate and up": (2048, 2048 + 16),
    "3B down": (11008, 272),
    "7B q, k, v, o, gate and up": (3584, 528),
    "7B down": (18944, 48),
    "odd": (96, 16),
    "odd and wide": (160, 1040),
}


@pytest.fixture(params=range(2), ids=["best", "AVX2"])
def kinds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kinds under test, of which the module takes this processor to be one."""
    chosen: list[Processor] = (KINDS[:1], [k for k in KINDS[1:] if k is AVX2])[request.param]
    for kind in chosen:
        monkeypatch.setattr(native, "processor", lambda kind=kind: kind)
    yield [kind.name for kind in chosen]


def stored(
    inputs: int, outputs: int, group: int, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(inputs + outputs)
    words, groups = outputs // 8, inputs // group
    qweight = torch.randint(-(2**31), 2**31, (inputs, words), dtype=torch.int32)
    qzeros = torch.randint(-(2**31), 2**31, (groups, words), dtype=torch.int32)
    return qweight, qzeros, (torch.rand(groups, outputs) * 0.01 + 1e-3).to(dtype)


def computed(x: Tensor, held: dict[str, Tensor], group: int, phase: str) -> Tensor:
    return native.run(x, held, None, group, phase, Scratch())  # type: ignore[arg-type]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_formula_at_the_true_shapes(shape: str, kinds: list[str]) -> None:
    inputs, outputs = SHAPES[shape]
    group = 32 if inputs < 2048 else 128
    tensors = stored(inputs, outputs, group)
    weights = reference.dequantize(*tensors, group)
    x = torch.randn(9, inputs).bfloat16()
    exact = x.double() @ weights.double()
    for _ in kinds:
        held = native.prepare(*tensors, group)
        held_bytes = sum(tensor.nbytes for tensor in held.values())
        assert held_bytes == linear_bytes(inputs, outputs, group, "native")
        for phase in ("decode", "prefill"):
            found = computed(x, held, group, phase)
            assert error(found, exact) < 3e-3, phase
            assert torch.equal(computed(x[:1], held, group, "decode"), found[:1]) or (
                phase == "prefill"
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_group_type_of_scale_and_number_of_rows(
    group: int, dtype: torch.dtype, kinds: list[str]
) -> None:
    tensors = stored(256, 80, group, dtype)
    weights = reference.dequantize(*tensors, group)
    bias = torch.randn(80).bfloat16()
    for _ in kinds:
        held = native.prepare(*tensors, group)
        for rows in range(1, 10):
            x = torch.randn(rows, 256).bfloat16()
            for phase in ("decode", "prefill"):
                found = native.run(x, held, bias, group, phase, Scratch())  # type: ignore[arg-type]
                assert error(found, x.double() @ weights.double() + bias.double()) < 3e-3, rows


@pytest.mark.parametrize(("inputs", "group"), [(96, 48), (512, 256), (1376, 1376)])
def test_rows_come_out_the_same_whatever_they_come_with(
    inputs: int, group: int, kinds: list[str]
) -> None:
    """In prefill: groups that are not unpacked at once, and more rows than are summed at a time."""
    tensors = stored(inputs, 16 * 9, group)
    weights = reference.dequantize(*tensors, group)
    x = torch.randn(517, inputs).bfloat16()
    for _ in kinds:
        held = native.prepare(*tensors, group)
        found = computed(x, held, group, "prefill")
        assert error(found, x.double() @ weights.double()) < 3e-3
        for rows in (slice(0, 1), slice(250, 257), slice(400, 417)):
            assert torch.equal(computed(x[rows], held, group, "prefill"), found[rows])


def test_rows_that_lie_apart_are_not_copied(
    kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = stored(512, 80, 64)
    wide = torch.randn(37, 1024).bfloat16()
    x = wide[:, :512]
    for _ in kinds:
        held = native.prepare(*tensors, 64)
        wanted = computed(x.contiguous(), held, 64, "prefill")
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "contiguous", lambda self: pytest.fail("copied"))
            assert torch.equal(computed(x, held, 64, "prefill"), wanted)
            files = dict(zip(("qweight", "qzeros", "scales"), tensors, strict=True))
            found = native_stored.run(x, files, None, 64, "prefill", Scratch())
            assert torch.equal(found, wanted)
        turned = wide.T.contiguous().T[:, :512]
        assert torch.equal(computed(turned, held, 64, "prefill"), wanted)


def test_single_weights_are_the_formula_rounded_once(kinds: list[str]) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        tensors = stored(256, 336, 64, dtype)
        wanted = reference.dequantize(*tensors, 64).bfloat16()
        for _ in kinds:
            held, scratch = native.prepare(*tensors, 64), Scratch()
            for phase in ("decode", "prefill"):
                ones = torch.eye(256).bfloat16()
                found = native.run(ones, held, None, 64, phase, scratch)  # type: ignore[arg-type]
                assert torch.equal(found, wanted)
            assert scratch.nbytes == 0


def test_sums_that_float32_holds_are_exact(kinds: list[str]) -> None:
    qweight, qzeros, scales = stored(256, 96, 64)
    tensors = (qweight, qzeros, torch.full_like(scales, 0.5))
    x = torch.randint(-2, 3, (3, 256)).bfloat16()
    wanted = (x.float() @ reference.dequantize(*tensors, 64)).bfloat16()
    for _ in kinds:
        held = native.prepare(*tensors, 64)
        for phase in ("decode", "prefill"):
            assert torch.equal(computed(x, held, 64, phase), wanted)


@pytest.mark.parametrize("scale", [65504.0, 6e-8, 0.0])
@pytest.mark.parametrize("zero", [0, 0x77777777, -1])
def test_extremes_stay_numbers(scale: float, zero: int, kinds: list[str]) -> None:
    qweight, qzeros, scales = stored(128, 32, 64)
    qzeros.fill_(zero)
    qweight[:64] = zero  # a group of nothing but zeros
    tensors = (qweight, qzeros, torch.full_like(scales, scale))
    x = (torch.randn(2, 128) * 1e4).bfloat16()
    exact = x.double() @ reference.dequantize(*tensors, 64).double()
    for _ in kinds:
        held = native.prepare(*tensors, 64)
        for phase in ("decode", "prefill"):
            found = computed(x, held, 64, phase)
            assert bool(found.isfinite().all())
            assert float((found.double() - exact).abs().max()) <= 0.01 * float(exact.abs().max())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int, kinds: list[str]) -> None:
    tensors = stored(512, 1040, 128)
    x = torch.randn(1, 512).bfloat16()
    before = torch.get_num_threads()
    try:
        for _ in kinds:
            torch.set_num_threads(1)
            alone = native.prepare(*tensors, 128)
            wanted = [computed(x, alone, 128, phase) for phase in ("decode", "prefill")]
            torch.set_num_threads(threads)
            held = native.prepare(*tensors, 128)
            assert all(torch.equal(held[name], alone[name]) for name in held)
            assert torch.equal(computed(x, held, 128, "decode"), wanted[0])
            assert torch.equal(computed(x, held, 128, "prefill"), wanted[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.012), (4, 0.09)])
def test_a_rounded_head(bits: int, bound: float, kinds: list[str]) -> None:
    weight = torch.randn(4096 + 48, 96).bfloat16()
    weight[7] = 0.0
    x = torch.randn(2, 96).bfloat16()
    exact = x.double() @ weight.double().T
    for _ in kinds:
        head = RoundedHead(96, len(weight), bits)  # type: ignore[arg-type]
        head.fill_from(lambda start, stop: weight[start:stop].clone(), torch.device("cpu"))
        assert head.compiled and head.rounded
        assert sum(b.nbytes for b in head.buffers()) == head_bytes(96, len(weight), bits)  # type: ignore[arg-type]
        found = head(x)
        assert 0 < error(found, exact) < bound and found[:, 7].abs().max() < 1e-6


def test_joined_linears_and_the_planned_kernel(kinds: list[str]) -> None:
    for _ in kinds:
        linears = [QuantLinear(512, n, False, 64, dtype=torch.bfloat16) for n in (512, 1024)]
        weights = []
        for linear in linears:
            tensors = stored(512, linear.out_features, 64)
            weights.append(reference.dequantize(*tensors, 64))
            for name, tensor in zip(("qweight", "qzeros", "scales"), tensors, strict=True):
                linear.get_buffer(name).copy_(tensor)
        planned = preferred_kernel("cpu", "bfloat16", weights=512 * 512)
        join(linears)
        assert (linears[0].kernel.name, linears[0].kernel.reason) == planned
        assert planned.name == "native" and linears[0].joined == (512, 1024)
        x = torch.randn(1, 3, 512).bfloat16()
        for phase in ("decode", "prefill"):
            with kernel_phase(phase):  # type: ignore[arg-type]
                found = apply_all(linears, x)
            for one, weight in zip(found, weights, strict=True):
                assert error(one, x.double() @ weight.double()) < 3e-3


def test_gate_and_up_are_one_product_while_decoding(
    kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    gated = native.gated
    monkeypatch.setattr(native, "gated", lambda x, *rest: calls.append(len(x)) or gated(x, *rest))
    for _ in kinds:
        pair = [QuantLinear(512, 512, False, 64, dtype=torch.bfloat16) for _ in "12"]
        for seed, linear in enumerate(pair):
            tensors = stored(512, 512, 64)
            for name, tensor in zip(("qweight", "qzeros", "scales"), tensors, strict=True):
                linear.get_buffer(name).copy_(tensor.roll(seed, 0))
        join(pair)
        x, found = torch.randn(1, 2, 512).bfloat16(), {}
        for phase in ("decode", "prefill"):
            with kernel_phase(phase):  # type: ignore[arg-type]
                found[phase] = apply_gated(pair[0], pair[1], x)
        assert found["decode"].shape == (1, 2, 512)
        assert error(found["decode"], found["prefill"].double()) < 1e-2
    assert calls == [2] * len(kinds)


def test_gates_are_what_the_operations_one_by_one_make(kinds: list[str]) -> None:
    bias = torch.randn(192).bfloat16()
    values = torch.cat((torch.linspace(-120, 120, 4096), torch.tensor([-1e38, 1e38, 0.0])))
    for _ in kinds:
        tensors = stored(256, 192, 64)
        held = native.prepare(*tensors, 64)
        for rows in (1, 3):
            x = torch.randn(rows, 256).bfloat16() * 8
            both = native.run(x, held, bias, 64, "decode", Scratch())
            wanted = F.silu(both[:, :96]) * both[:, 96:]
            found = native.gated(x, held, bias, 64)
            torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)
            assert (found == wanted).float().mean() > 0.98
        # One input of one and weights of nothing: the gates are the biases, whatever they are.
        nothing = (torch.zeros(32, 4, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int32))
        held = native.prepare(*nothing, torch.ones(1, 32).half(), 32)
        for gates in values.split(16):
            both = torch.cat((F.pad(gates, (0, 16 - len(gates))), torch.ones(16))).bfloat16()
            found = native.gated(torch.zeros(1, 32).bfloat16(), held, both, 32)[0]
            torch.testing.assert_close(found, F.silu(both[:16]), rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_no_rows_give_no_rows(phase: str, kinds: list[str]) -> None:
    for _ in kinds:
        held = native.prepare(*stored(128, 48, 64), 64)
        assert computed(torch.empty(0, 128).bfloat16(), held, 64, phase).shape == (0, 48)


def test_addresses_are_given_only_of_what_fits() -> None:
    for _ in KINDS:
        held = native.prepare(*stored(128, 16, 64), 64)
        wrong = (torch.randn(1, 128), torch.randn(1, 64).bfloat16())
        for x in (*wrong, torch.empty(1, 128, dtype=torch.bfloat16, device="meta")):
            with pytest.raises(TypeError, match="wanted bfloat16"):
                computed(x, held, 64, "decode")


@pytest.mark.parametrize(
    ("broken", "place"), [("from_file", 3), ("four_bits", 7), ("four_bits_many", 7)]
)
def test_what_computes_wrong_is_not_used(
    broken: str, place: int, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = native.Library.call

    def mistaken(self: native.Library, name: str, *given: int | None) -> None:
        """Takes numbers for those of another form, or makes them so."""
        changed = list(given)
        if name == broken:
            changed[place] = (given[place] or 0) ^ (1 if broken == "from_file" else 2)
        call(self, name, *changed)

    for _ in kinds:
        assert native._right()
        native.library.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(native.Library, "call", mistaken)
            with pytest.warns(UserWarning, match="do not compute what they should"):
                found = select(Problem("cpu", torch.bfloat16, 2048, 256, 128))
        native.library.cache_clear()
        assert found.name == "cpu" and "they do not compute" in found.reason


@pytest.mark.parametrize(
    ("problem", "name", "reason"),
    [
        (Problem("cpu", torch.bfloat16, 2048, 264, 128), "reference", "264 outputs"),
        (Problem("cpu", torch.float32, 2048, 256, 128), "reference", "not in float32"),
        (Problem("cpu", torch.bfloat16, 512, 256, 128), "cpu", "131,072 weights gains too little"),
    ],
)
def test_what_is_left_to_others(problem: Problem, name: KernelName, reason: str) -> None:
    found = select(problem)
    assert found.name == name and reason in found.reason


def test_other_types_are_refused() -> None:
    refused = native.refusal(Problem("cpu", torch.float16, 2048, 2048, 128))
    assert refused is not None and "float16" in refused


def test_kinds_of_processors() -> None:
    old, new = " ".join(AVX2.needs), " ".join(AVX512.needs)
    assert best_of(f"flags\t\t: {new}\nflags\t\t: {new} more\n") is AVX512
    assert best_of(f"flags\t\t: {new}\nflags\t\t: {old}\n") is AVX2
    assert best_of("flags\t\t: sse2 avx2 fma\n") is None and best_of("Features : neon\n") is None
