"""Whole requests on the compiled kernels: planned by name, within the plan, repeatable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lowvram import LowVRAMOmni
from lowvram.pocket import make_checkpoint
from lowvram.quant.kernels import native
from lowvram.quant.native import not_offered

WORDS = [{"role": "user", "content": "Say something."}]


@pytest.mark.parametrize("allow", [[], ["head4"], ["head8"]], ids=str)
def test_a_request_keeps_its_plan(
    allow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model", awq=True, speech=False)
    options = {"max_new_tokens": 4, "return_audio": False, "temperature": 0.0}
    texts, calls, run = [], [0], native.run

    def counted(*arguments: Any) -> Tensor:
        calls[-1] += 1
        return run(*arguments)

    monkeypatch.setattr(native, "run", counted)
    # The built-in model is too small for them by itself.
    for switch in ("1", "1", "0"):
        monkeypatch.setenv("LOWVRAM_NATIVE", switch)
        kernel = "native" if not_offered(1) is None else "cpu"
        with LowVRAMOmni.from_pretrained(folder, device="cpu", allow=allow) as omni:
            plan = omni.plan(WORDS, **options)  # type: ignore[arg-type]
            reply = omni.generate(WORDS, **options)  # type: ignore[arg-type]
        lines = [line for line in plan.reasons if line.startswith("packed linears, ")]
        assert len(lines) == 1 and lines[0].startswith(f"packed linears, {kernel}: bfloat16")
        for row in reply.report.phases:
            assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes
        assert set(reply.report.option_errors) == set(allow)
        texts.append(reply.text)
        assert (calls[-1] > 0) == (kernel == "native")
        calls.append(0)
    assert texts[0] == texts[1]
