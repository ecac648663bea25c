"""Products on a GPU that is not there: everything is launched as on one, by Triton's own launcher,
up to where the driver would be. Prints the kernels that were compiled.

`test_quant_triton_compiled.py` runs this in a process of its own, for Triton has one driver.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lowvram.quant import Scratch
from lowvram.quant.triton import products

BRAIN = torch.bfloat16


class NoDriver:
    """What is asked of a driver before a kernel is loaded."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def main(capability: int) -> None:
    driver.set_active(NoDriver(capability))
    run, compiled = JITFunction.run, JITFunction._do_compile

    def launched(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def told(self: Any, *args: Any) -> Any:
        print(self.fn.__name__)
        return compiled(self, *args)

    JITFunction.run, JITFunction._do_compile = launched, told
    products._processors = lambda device: 132  # type: ignore[assignment]
    # A 7B's gate and up, joined; and what is not split, with a bias, and no multiple of 16 words.
    for inputs, outputs, gated in ((3584, 37888, True), (128, 64, False)):
        shapes = (inputs, outputs // 8), (inputs // 128, outputs // 8)
        words, zeros = (torch.zeros(shape, dtype=torch.int32) for shape in shapes)
        scales, bias = torch.zeros(inputs // 128, outputs).half(), torch.zeros(outputs, dtype=BRAIN)
        for _ in range(2):  # the second time everything is there
            for rows in (1, 9):
                x = torch.zeros(rows, inputs, dtype=BRAIN)
                given = x, words, zeros, scales, None if gated else bias, 128, Scratch()
                products.product(*given, gated=gated)
        out = torch.zeros(inputs, 64, dtype=BRAIN)
        products.unpacked(words, zeros, scales, 128, slice(0, 64), out)
    rows = torch.zeros(1, 896, dtype=BRAIN), torch.zeros(8448, 896, dtype=torch.int8)
    products.product_of_bytes(*rows, torch.zeros(8448, dtype=BRAIN), None, Scratch())


if __name__ == "__main__":
    main(int(sys.argv[1]))
