"""On `meta` the reference kernel takes the memory that it takes where it computes."""

from __future__ import annotations

import pytest
import torch

from lowvram.offload import Meter, open_device
from lowvram.quant import Scratch
from lowvram.quant.kernels import reference

GROUP = 64


def peak(device: str, rows: int, outputs: int, dtype: torch.dtype) -> dict[str, int]:
    meter = Meter(open_device(device))

    def told(buffer: torch.Tensor | None) -> None:
        if buffer is not None:
            meter.hold("workspace", "weights", buffer.nbytes, [buffer])

    inputs = 256
    with torch.device(device):
        held = {
            "qweight": torch.zeros(inputs, outputs // 8, dtype=torch.int32),
            "qzeros": torch.zeros(inputs // GROUP, outputs // 8, dtype=torch.int32),
            "scales": torch.zeros(inputs // GROUP, outputs, dtype=torch.float16),
        }
        x = torch.zeros(rows, inputs, dtype=dtype)
        bias = torch.zeros(outputs, dtype=dtype)
    scratch = Scratch(told)
    with meter.phase("work"), torch.inference_mode():
        out = reference.run(x, held, bias, GROUP, "prefill", scratch)
        assert (out.shape, out.dtype) == ((rows, outputs), dtype)
    return meter.phases[0].peak_by_owner


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize("outputs", [64, 320])
def test_what_is_held_is_the_same(
    rows: int, outputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reference.PIECE_WEIGHTS, "reference", 256 * 96)
    real, shapes = (peak(device, rows, outputs, dtype) for device in ("cpu", "meta"))
    assert shapes["workspace"] == real["workspace"] > 0
    # `arange` and `stack` of the shifts are a few bytes on the real device.
    assert shapes["activations"] <= real["activations"] <= shapes["activations"] + 4096
