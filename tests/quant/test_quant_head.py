"""The rounded head: how far from its 16 bits, what it holds, and where it is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from allocations import Allocations

from lowvram import LowVRAMOmni
from lowvram.pocket import make_checkpoint
from lowvram.quant import HeadBits, RoundedHead, choose_head, head_bytes, rounding_bytes
from lowvram.quant.kernels import cpu
from lowvram.quant.sizes import rounding_rows

WORDS = [{"role": "user", "content": "Say something."}]


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.012), (4, 0.09)])
def test_rounds_to_the_nearest_and_holds_what_is_planned(bits: HeadBits, bound: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1152, 96).bfloat16()
    weight[7] = 0.0
    asked: list[int] = []

    def rows(start: int, stop: int) -> torch.Tensor:
        asked.append(stop - start)
        return weight[start:stop].clone()

    with torch.device("meta"):
        head = RoundedHead(96, 1152, bits)
    assert not head.rounded
    head.fill_from(rows, torch.device("cpu"))
    assert head.rounded and not list(head.parameters())
    assert max(asked) == rounding_rows(96) < 1152  # never the whole
    assert sum(b.nbytes for b in head.buffers()) == head_bytes(96, 1152, bits)
    x = torch.randn(1, 96).bfloat16()
    exact, found = x.float() @ weight.float().T, head(x).float()
    assert 0 < (found - exact).norm() / exact.norm() < bound
    assert found[0, 7].abs() < 1e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_filling_takes_itself_and_a_piece(bits: HeadBits) -> None:
    inputs = 96
    for pieces in (1, 3):
        outputs = pieces * rounding_rows(96)
        with torch.device("meta"):
            head = RoundedHead(inputs, outputs, bits)
        with Allocations() as seen:
            head.fill_from(lambda a, b: torch.ones(b - a, inputs).bfloat16(), torch.device("cpu"))
        held = head_bytes(inputs, outputs, bits)
        # All that a piece ever allocates, were none of it given back; pieces follow each other.
        assert held < sum(seen.sizes) <= held + pieces * rounding_bytes(inputs, outputs)
    assert rounding_bytes(2048, 151936) < 2048 * 151936 // 5


def test_keeps_the_weight_where_the_product_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "aten_order", lambda: None)
    weight = torch.randn(1152, 96).bfloat16()
    with torch.device("meta"):
        head = RoundedHead(96, 1152, 4)
    head.fill_from(lambda start, stop: weight[start:stop], torch.device("cpu"))
    assert not head.rounded and torch.equal(head.weight, weight)
    x = torch.randn(1, 96).bfloat16()
    torch.testing.assert_close(head(x), x @ weight.T)


def test_is_chosen_only_where_allowed_and_faster() -> None:
    assert choose_head((), "cpu", 256, 1024) is None
    assert choose_head(("kv8",), "cpu", 256, 1024) is None
    chosen = choose_head(("head8", "head4"), "cpu", 256, 1024)
    assert chosen is not None and chosen.bits == 4
    chosen = choose_head(("head8",), "cpu", 256, 1024)
    assert chosen is not None and chosen.bits == 8
    for kernel, inputs, why in (("tinygemm", 256, "on the CPU"), ("cpu", 40, "cannot be packed")):
        refused = choose_head(("head4",), kernel, inputs, 1024)  # type: ignore[arg-type]
        assert refused is not None and refused.bits is None and why in refused.reason


def test_on_cuda_there_are_8_bits() -> None:
    for allow in (("head8",), ("head4", "head8")):
        chosen = choose_head(allow, "triton", 256, 1024)
        assert chosen is not None and chosen.bits == 8 and chosen.reason.startswith("head8: ")
    refused = choose_head(("head4",), "triton", 256, 1024)
    assert refused is not None and refused.bits is None and "there is head8" in refused.reason


@pytest.mark.parametrize(("allow", "low", "high"), [("head8", 1e-4, 0.02), ("head4", 0.01, 0.15)])
def test_a_request_reports_its_error_and_keeps_its_plan(
    allow: str, low: float, high: float, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "model", awq=True, speech=False)
    options = {"max_new_tokens": 4, "return_audio": False}
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as omni:
        plain = omni.plan(WORDS, **options)  # type: ignore[arg-type]
        assert not omni.generate(WORDS, **options).report.option_errors  # type: ignore[arg-type]
    with LowVRAMOmni.from_pretrained(folder, device="cpu", allow=[allow]) as omni:
        plan = omni.plan(WORDS, **options)  # type: ignore[arg-type]
        report = omni.generate(WORDS, **options).report  # type: ignore[arg-type]
        again = omni.generate(WORDS, **options).report  # type: ignore[arg-type]
    assert any(reason.startswith(f"{allow}: ") for reason in plan.reasons)
    assert any(reason.startswith("packed linears, cpu: bfloat16") for reason in plain.reasons)
    assert plan.phase("decode").parts["weights"] < plain.phase("decode").parts["weights"]
    for row in (*report.phases, *again.phases):
        assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes
    assert low < report.option_errors[allow] < high
    assert f"{allow} moves logits by" in str(report)
    assert again.option_errors == report.option_errors
