"""The rounded head: how far from its 16 bits, what it holds, and where it is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowvram import LowVRAMOmni
from lowvram.pocket import make_checkpoint
from lowvram.quant import HeadBits, RoundedHead, choose_head, head_bytes

WORDS = [{"role": "user", "content": "Say something."}]


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.012), (4, 0.09)])
def test_rounds_to_the_nearest_and_holds_what_is_planned(bits: HeadBits, bound: float) -> None:
    torch.manual_seed(0)
    head = RoundedHead(96, 1152, bits).to(torch.bfloat16)
    weight = torch.randn(1152, 96).bfloat16()
    weight[7] = 0.0
    head.weight.data = weight.clone()
    x = torch.randn(1, 96).bfloat16()
    assert not head.rounded
    exact = head(x).float()
    head.after_load()
    assert head.rounded
    assert sum(b.nbytes for b in head.buffers()) == head_bytes(96, 1152, bits)
    found = head(x).float()
    assert 0 < (found - exact).norm() / exact.norm() < bound
    assert found[0, 7].abs() < 1e-6


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


@pytest.mark.parametrize(("allow", "low", "high"), [("head8", 1e-4, 0.02), ("head4", 0.01, 0.15)])
def test_a_request_reports_its_error_and_keeps_its_plan(
    allow: str, low: float, high: float, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "model", awq=True, speech=False)
    options = {"max_new_tokens": 4, "return_audio": False}
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as omni:
        plain = omni.plan(WORDS, **options)  # type: ignore[arg-type]
        assert omni.generate(WORDS, **options).report.head_error is None  # type: ignore[arg-type]
    with LowVRAMOmni.from_pretrained(folder, device="cpu", allow=[allow]) as omni:
        plan = omni.plan(WORDS, **options)  # type: ignore[arg-type]
        report = omni.generate(WORDS, **options).report  # type: ignore[arg-type]
        again = omni.generate(WORDS, **options).report  # type: ignore[arg-type]
    assert any(reason.startswith(f"{allow}: ") for reason in plan.reasons)
    assert any(reason.startswith("packed linears, cpu: bfloat16") for reason in plain.reasons)
    assert plan.phase("decode").parts["weights"] < plain.phase("decode").parts["weights"]
    for row in (*report.phases, *again.phases):
        assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes
    assert report.head_error is not None and low < report.head_error < high
    assert "rounded head" in str(report)
    assert again.head_error == report.head_error
