"""The compiled kernels on weights as a file has them: every bit of what prepared ones give."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowvram.quant import (
    Problem,
    QuantLinear,
    Scratch,
    apply_all,
    apply_gated,
    join,
    kernel_phase,
    preferred_kernel,
    scratch_bytes,
    select,
)
from lowvram.quant.kernels import Stored, native, native_stored, reference, select_stored
from lowvram.quant.native import Processor, not_offered, processor
from lowvram.quant.native.processors import AVX2, AVX512

OWN = processor()
KINDS = [kind for kind in (AVX512, AVX2) if OWN and kind.needs <= OWN.needs]
"""Of processors that can be tried here; none where nothing would be compiled."""

if not_offered(1 << 20) is not None:
    KINDS = []

SHAPES = {  # inputs, outputs and group; of the outputs, as many as end in the midst of a line
    "3B q, o, gate and up": (2048, 2048 + 16, 128),
    "3B down": (11008, 272, 128),
    "7B q, k, v, o, gate and up": (3584, 528, 128),
    "7B down": (18944, 48, 128),
    "odd": (96, 16, 32),
    "odd and wide": (160, 1040, 32),
    "groups that are not unpacked at once": (1376, 144, 1376),
}
ROWS = (*range(1, 10), 37, 300)
PHASES = ("decode", "prefill")


@pytest.fixture(params=range(2), ids=["best", "AVX2"])
def kinds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kinds under test, of which the modules take this processor to be one."""
    chosen: list[Processor] = (KINDS[:1], [k for k in KINDS[1:] if k is AVX2])[request.param]
    for kind in chosen:
        monkeypatch.setattr(native, "processor", lambda kind=kind: kind)
        monkeypatch.setattr(native_stored, "processor", lambda kind=kind: kind)
    yield [kind.name for kind in chosen]


def stored(inputs: int, outputs: int, group: int, dtype: torch.dtype = torch.float16) -> Stored:
    """Of any words, and a bias."""
    torch.manual_seed(inputs + outputs)
    words, groups = outputs // 8, inputs // group
    held = {
        "qweight": torch.randint(-(2**31), 2**31, (inputs, words), dtype=torch.int32),
        "qzeros": torch.randint(-(2**31), 2**31, (groups, words), dtype=torch.int32),
        "scales": (torch.rand(groups, outputs) * 0.01 + 1e-3).to(dtype),
    }
    return held, torch.randn(outputs).bfloat16()


def prepared(linears: list[Stored], group: int) -> Stored:
    """As they are held where they stay: side by side."""
    every = [native.prepare(*held.values(), group) for held, _ in linears]
    held = {name: torch.cat([one[name] for one in every]) for name in native.JOINS}
    return held, torch.cat([bias for _, bias in linears if bias is not None])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_at_the_true_shapes(shape: str, kinds: list[str]) -> None:
    inputs, outputs, group = SHAPES[shape]
    held, bias = stored(inputs, outputs, group)
    x = torch.randn(max(ROWS), inputs).bfloat16()
    for _ in kinds:
        ready = native.prepare(*held.values(), group)
        for rows in ROWS if inputs < 4096 else (1, 2, 3, 8, 37):
            for phase in PHASES if rows < 300 else PHASES[1:]:
                given, scratch = (bias if rows % 2 else None, group, phase), Scratch()
                wanted = native.run(x[:rows], ready, *given, scratch)  # type: ignore[arg-type]
                found = native_stored.run(x[:rows], held, *given, scratch)  # type: ignore[arg-type]
                assert torch.equal(found, wanted), (rows, phase)
                assert not scratch.nbytes


@pytest.mark.parametrize("phase", PHASES)
def test_each_kind_has_its_own_code(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where several are loaded too. The products of AVX512-BF16 take the smallest inputs for
    nothing."""
    held, _ = stored(64, 32, 32)
    held["qzeros"].fill_(-0x77777778)  # zero points of 8
    held["scales"].fill_(1024)
    x = torch.full((1, 64), 2.0**-130).bfloat16()
    given = (None, 32, phase, Scratch())
    for kind in KINDS:
        monkeypatch.setattr(native, "processor", lambda kind=kind: kind)
        ready = native.prepare(*held.values(), 32)
        for found in (native.run(x, ready, *given), native_stored.run(x, held, *given)):  # type: ignore[arg-type]
            assert bool(found.any()) == (kind is AVX2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_prepared_weights_are_those_of_the_file(
    group: int, dtype: torch.dtype, kinds: list[str]
) -> None:
    """Both ways begin with the same code: here it is held against the formula."""
    for outputs in (*range(16, 160, 16), 272):
        held, _ = stored(256, outputs, group, dtype)
        wanted = reference.dequantize(*held.values(), group).bfloat16()
        for _ in kinds:
            for phase in PHASES:
                given = (None, group, phase, Scratch())
                found = native_stored.run(torch.eye(256).bfloat16(), held, *given)  # type: ignore[arg-type]
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs", "group"), [(2048, 528, 128), (160, 272, 32)])
def test_a_gate_and_what_passes_it(
    inputs: int, outputs: int, group: int, dtype: torch.dtype, kinds: list[str]
) -> None:
    pair = [stored(inputs, outputs, group, dtype), stored(inputs, outputs, group, dtype)]
    pair[1] = {name: tensor.roll(1, 0) for name, tensor in pair[1][0].items()}, pair[0][1].roll(1)
    x = torch.randn(9, inputs).bfloat16()
    for _ in kinds:
        held, bias = prepared(pair, group)
        bare = [(each, None) for each, _ in pair]
        for rows in range(1, 10):
            wanted = native.gated(x[:rows], held, bias, group)
            assert torch.equal(native_stored.gated(x[:rows], *pair, group), wanted)
            wanted = native.gated(x[:rows], held, None, group)
            assert torch.equal(native_stored.gated(x[:rows], *bare, group), wanted)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int, kinds: list[str]) -> None:
    pair = [stored(512, 1040, 128), stored(512, 1040, 128)]
    x = torch.randn(300, 512).bfloat16()
    before = torch.get_num_threads()
    try:
        for _ in kinds:
            torch.set_num_threads(1)
            held, bias = prepared(pair, 128)
            torch.set_num_threads(threads)
            for rows in (1, 9, 300):
                for phase in PHASES:
                    wanted = native.run(x[:rows], held, bias, 128, phase, Scratch())  # type: ignore[arg-type]
                    found = native_stored.beside(x[:rows], pair, 128, phase)  # type: ignore[arg-type]
                    assert torch.equal(found, wanted)
                wanted = native.gated(x[:rows], held, bias, 128)
                assert torch.equal(native_stored.gated(x[:rows], *pair, 128), wanted)
    finally:
        torch.set_num_threads(before)


def linears(widths: list[int], dtype: torch.dtype, inputs: int = 512) -> list[QuantLinear]:
    """With biases, and with nothing done after they were loaded."""
    made = []
    for width in widths:
        linear = QuantLinear(inputs, width, True, 64, dtype=torch.bfloat16, scales_dtype=dtype)
        held, bias = stored(inputs, width, 64, dtype)
        for name, tensor in (*held.items(), ("bias", bias)):
            assert tensor is not None
            linear.get_buffer(name).copy_(tensor.roll(len(made), 0))
        made.append(linear)
    return made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [[640], [1024, 512, 512], [640, 640]], ids=str)
def test_a_linear_that_streams_is_one_that_stays(
    widths: list[int], dtype: torch.dtype, kinds: list[str]
) -> None:
    for _ in kinds:
        streamed, resident = linears(widths, dtype), linears(widths, dtype)
        join(resident)
        planned = preferred_kernel("cpu", "bfloat16", weights=512 * 512)
        for phase in PHASES:
            for shape in ((1, 1), (1, 3), (2, 20)):
                x = torch.randn(*shape, 512).bfloat16()
                with kernel_phase(phase):  # type: ignore[arg-type]
                    wanted = list(apply_all(resident, x))
                    found = list(apply_all(streamed, x))
                    single = [linear(x) for linear in streamed]
                    if len(set(widths)) == 1 and len(widths) == 2:
                        wanted.append(apply_gated(*resident, x))
                        found.append(apply_gated(*streamed, x))
                        single.append(found[-1])
                for one, alone, other in zip(found, single, wanted, strict=True):
                    assert torch.equal(one, other) and torch.equal(alone, other)
                    assert one.stride() == other.stride()
        kernels = [(one.kernel.name, one.kernel.reason) for one in (*streamed, resident[0])]
        assert kernels == [planned] * len(kernels) and "stream" in planned.reason
        assert all(one.scratch.nbytes == 0 for one in streamed)


def test_linears_of_different_kinds_stay_apart(kinds: list[str]) -> None:
    for _ in kinds:
        x = torch.randn(1, 2, 512).bfloat16()
        for others in (
            linears([640], torch.bfloat16),
            [QuantLinear(512, 640, True, 64, dtype=torch.bfloat16, kernel="reference")],
            [nn.Linear(512, 640).bfloat16()],
        ):
            first = linears([640], torch.float16)[0]
            for phase in PHASES:
                with kernel_phase(phase):  # type: ignore[arg-type]
                    found = apply_gated(first, others[0], x)
                    wanted = F.silu(first(x)) * others[0](x)
                assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("phase", PHASES)
def test_no_rows_give_no_rows(phase: str, kinds: list[str]) -> None:
    for _ in kinds:
        pair = [stored(128, 48, 64), stored(128, 48, 64)]
        x = torch.empty(0, 128).bfloat16()
        assert native_stored.beside(x, pair, 64, phase).shape == (0, 96)  # type: ignore[arg-type]
        assert native_stored.gated(x, *pair, 64).shape == (0, 48)


def test_addresses_are_given_only_of_what_fits() -> None:
    for _ in KINDS:
        held, _bias = stored(128, 16, 64)
        wrong = (torch.randn(1, 128), torch.randn(1, 64).bfloat16())
        for x in (*wrong, torch.empty(1, 128, dtype=torch.bfloat16, device="meta")):
            with pytest.raises(TypeError, match="wanted bfloat16"):
                native_stored.run(x, held, None, 64, "decode", Scratch())
        wide, _bias = stored(128, 32, 64)
        for name, end in (("qweight", 2), ("qzeros", 2), ("scales", 16)):
            with pytest.raises(TypeError, match="in one piece"):
                torn = {**held, name: wide[name][:, :end]}
                native_stored.run(
                    torch.randn(1, 128).bfloat16(), torn, None, 64, "decode", Scratch()
                )


@pytest.mark.parametrize("broken", ["four_bits_stored", "four_bits_many_stored"])
def test_what_computes_wrong_is_not_used(
    broken: str, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = native.Library.call

    def mistaken(self: native.Library, name: str, *given: int | None) -> None:
        """Takes scales of one type for those of another."""
        changed = list(given)
        if name == broken:
            changed[6] = (given[6] or 0) ^ native.FLOAT16
        call(self, name, *changed)

    problem = Problem("cpu", torch.bfloat16, 2048, 11008, 128)
    for _ in kinds:
        native_stored._agrees.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(native.Library, "call", mistaken)
            with pytest.warns(UserWarning, match="are not used for layers that stream"):
                found = select_stored(problem)
        native_stored._agrees.cache_clear()
        assert found.name == "reference" and "do not compute what they should" in found.reason
        assert select_stored(problem).name == "native"


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(2048, 11008), (18944, 3584), (512, 512), (64, 4096), (8192, 64)]
)
def test_the_reference_takes_its_place_within_the_same_scratch(
    inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is made before anything is built."""
    monkeypatch.setattr(native_stored, "refusal", lambda problem: "spoilt")
    problem = Problem("cpu", torch.bfloat16, inputs, outputs, 32)
    kernel, scratch = select_stored(problem), Scratch()
    if preferred_kernel("cpu", "bfloat16", weights=inputs * outputs).name != "native":
        assert not KINDS
        return
    assert kernel.name == "reference" and "spoilt" in kernel.reason
    held, bias = stored(inputs, outputs, 32)
    x = torch.randn(2, inputs).bfloat16()
    found = kernel.run(x, held, bias, 32, "decode", scratch)
    wanted = reference.run(x, held, bias, 32, "decode", Scratch())
    torch.testing.assert_close(found, wanted)
    zeros = 8 * (inputs // 32) * kernel.run.keywords["step"]  # type: ignore[attr-defined]
    assert scratch.nbytes + zeros <= scratch_bytes(inputs, outputs, "native", 32)


def test_a_shape_that_nobody_takes_streams_as_it_stays() -> None:
    for problem in (
        Problem("cpu", torch.bfloat16, 2048, 264, 128),
        Problem("cpu", torch.float32, 2048, 256, 128),
    ):
        stays, streams = select(problem), select_stored(problem)
        assert stays.name == streams.name == "reference" and stays.run is streams.run
