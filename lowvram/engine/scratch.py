"""The one place for weights to be de-quantized into, known to the meter."""

from __future__ import annotations

import torch

from lowvram.offload import Meter
from lowvram.quant import Scratch

OWNER, KEY = "workspace", "de-quantized weights"


def metered_scratch(meter: Meter) -> Scratch:
    """A scratch that counts as workspace while it is there."""

    def told(buffer: torch.Tensor | None) -> None:
        if buffer is None:
            meter.release(OWNER, KEY)
        else:
            meter.hold(OWNER, KEY, buffer.nbytes, [buffer])

    return Scratch(told)
