"""Whole requests on the compiled kernels: a budget in which layers stream changes no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lowvram import LowVRAMOmni
from lowvram.models.text import DecoderLayer
from lowvram.planner import Plan
from lowvram.pocket import make_checkpoint, pocket_config
from lowvram.quant.kernels import Problem, native_stored
from lowvram.quant.native import not_offered

WORDS = [{"role": "user", "content": "Say something. " * 20}]
ASKED: dict[str, Any] = {"max_new_tokens": 6, "return_audio": False, "temperature": 0.0}


def deep(folder: Path) -> Path:
    """The built-in model with so many layers that two slabs are less."""
    config = pocket_config()
    config["thinker_config"]["text_config"]["num_hidden_layers"] = 16
    return make_checkpoint(folder, awq=True, speech=False, dtype="bfloat16", config=config)


def answered(folder: Path, budget: int | None) -> tuple[list[int], Plan]:
    """The tokens of the reply, and its plan, which was kept."""
    with LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory=budget) as omni:
        plan = omni.plan(WORDS, **ASKED)
        reply = omni.generate(WORDS, **ASKED)
    for row in reply.report.phases:
        assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes, row
    return list(reply.tokens), plan


def test_layers_that_stream_give_every_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The built-in model is too small for them by itself.
    monkeypatch.setenv("LOWVRAM_NATIVE", "1")
    if not_offered(1) is not None:
        return
    # Once in a process they are tried on small products, which is not what is counted here.
    assert native_stored.refusal(Problem("cpu", torch.bfloat16, 64, 64, 32)) is None
    seen: dict[tuple[int, int], npt.NDArray[np.int16]] = {}
    calls: set[str] = set()
    forward, into = DecoderLayer.forward, native_stored._call

    def noted(self: DecoderLayer, x: Tensor, rope: Any, cache: Any, start: int) -> Tensor:
        out = forward(self, x, rope, cache, start)
        # In memory that the report does not count.
        seen[self.index, start] = out.view(torch.int16).numpy().copy()
        return out

    def counted(name: str, *given: Any) -> None:
        calls.add(name)
        into(name, *given)

    monkeypatch.setattr(DecoderLayer, "forward", noted)
    monkeypatch.setattr(native_stored, "_call", counted)
    folder = deep(tmp_path / "model")
    tokens, roomy = answered(folder, None)
    wanted = dict(seen)
    assert not calls and not roomy.placements and len(wanted) == 16 * len(tokens)
    for more, whole in ((3 << 19, True), (5 << 19, False)):
        seen.clear()
        found, plan = answered(folder, roomy.minimum_budget_bytes + more)
        assert plan.chunks == roomy.chunks  # others would sum attention in other spans
        assert (len(plan.placements["text"].streamed) > 16) == whole
        assert any("native: " in line and "stream too" in line for line in plan.reasons)
        assert calls == {"four_bits_many_stored"}  # a token's layer is one call by itself
        assert found == tokens and seen.keys() == wanted.keys()
        assert all(np.array_equal(seen[place], wanted[place]) for place in wanted)
