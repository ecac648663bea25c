"""Options that may change results, on the simulated accelerator: as on the CPU, within budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simdevice as sim
import torch
from simdevice import simulated

from lowvram import LowVRAMOmni
from lowvram.models import attention as attention_module
from lowvram.models.bigvgan import LONGEST_TRANSPOSED
from lowvram.offload.accelerator import FALLBACK_CONTEXT_BYTES
from lowvram.pocket import make_checkpoint
from lowvram.quant.kernels import eight_bits

WORDS = [{"role": "user", "content": "Say something. " * 20}]
SHORT: dict[str, Any] = {"max_new_tokens": 4, "max_speech_seconds": 0.4}
EIGHT = ("talker8", "kv8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "pocket", seed=5, awq=True)


def opened(folder: Path, device: str, *allow: str, **options: Any) -> LowVRAMOmni:
    if device == "npu":
        sim.reset()
        limit = options.get("max_memory", 8 << 30)
        context = FALLBACK_CONTEXT_BYTES
        sim.configure(limit=limit, context=context, transposed=LONGEST_TRANSPOSED)
    return LowVRAMOmni.from_pretrained(
        folder, device=device, dtype="bfloat16", kernel="reference", allow=allow, **options
    )


@simulated
def test_every_budget_gives_the_reply_of_the_cpu(folder: Path) -> None:
    def blockwise(q: Any, k: Any, v: Any, scale: float) -> torch.Tensor:
        return attention_module.blockwise(q, k, v, causal=True, scale=scale)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    replies = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "_causal_cpu", blockwise)
        patch.setattr(eight_bits, "product_of", lambda *problem: "pieces")
        for allow in (EIGHT, EIGHT[1:]):
            with opened(folder, "cpu", *allow) as omni:
                replies[allow] = omni.generate(WORDS, **SHORT)
    torch.set_num_threads(threads)
    with opened(folder, "npu", *EIGHT) as omni:
        plan = omni.plan(WORDS, **SHORT)
    homes: set[str] = set()
    least, most = plan.minimum_budget_bytes, plan.predicted_peak_bytes + 100 * 2**20
    for budget in (least, most):
        with opened(folder, "npu", *EIGHT, max_memory=budget) as omni:
            planned = omni.plan(WORDS, **SHORT)
            reply = omni.generate(WORDS, **SHORT)
        homes |= set(planned.kv.values())
        # A Talker that streams is not rounded.
        assert planned.used == (EIGHT[1:] if "talker" in planned.placements else EIGHT)
        assert not reply.report.notes and set(reply.report.option_errors) == set(planned.used)
        wanted = replies[planned.used]
        assert (reply.tokens, reply.codes) == (wanted.tokens, wanted.codes)
        assert np.array_equal(reply.audio, wanted.audio)  # type: ignore[arg-type]
        for name, error in reply.report.option_errors.items():
            assert error == pytest.approx(wanted.report.option_errors[name], rel=1e-3)
        for row in reply.report.phases:
            assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes
        assert torch.npu.max_memory_reserved() + FALLBACK_CONTEXT_BYTES <= budget
        assert sim.races() == [] and sim.live_bytes() == sim.pinned_bytes() == 0
    assert homes == {"device", "host"}


@simulated
def test_half_a_vocoder_computes_in_float16(folder: Path) -> None:
    with opened(folder, "npu") as omni:
        plain = omni.generate(WORDS, **SHORT)
    with opened(folder, "npu", "vocoder16") as omni:
        found = omni.generate(WORDS, **SHORT)
    assert found.codes == plain.codes and found.audio is not None and plain.audio is not None
    assert 0 < np.linalg.norm(found.audio - plain.audio) < 0.02 * np.linalg.norm(plain.audio)
    assert 1e-5 < found.report.option_errors["vocoder16"] < 1e-3
    for row in found.report.phases:
        assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes
