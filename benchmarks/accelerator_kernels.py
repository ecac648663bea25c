"""What `accelerator.py` runs to compare kernels: single products of random weights at true shapes.

A decoder layer's linears, joined as the engine joins them, for one token and for a prompt, by every
kernel that the device offers; beside them what reading the weights alone would take, at the rate of
a copy on the same device, and cuBLAS on 16-bit weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from random_checkpoint import RandomCheckpoint
from torch import Tensor

from lowvram.quant import KernelName, Problem, Scratch, linear_bytes
from lowvram.quant.kernels import cpu, eight_bits, native, reference, tinygemm, triton
from lowvram.tensors import thinker_linears

PROMPT = 2048
"""Tokens of a prompt."""

JOINED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
MODULES: dict[KernelName, Any] = {
    "triton": triton,
    "tinygemm": tinygemm,
    "native": native,
    "cpu": cpu,
    "reference": reference,
}
OFFERED: dict[str, tuple[KernelName, ...]] = {
    "cuda": ("triton", "tinygemm", "reference"),
    "cpu": ("native", "cpu", "reference"),
}
COPIES_BYTES = {"cuda": 256 << 20}
"""Weights that are read in turn, so that none is found in a cache; others take one copy."""


@dataclass(frozen=True)
class Shape:
    """A linear, or several of one input as one."""

    name: str
    inputs: int
    outputs: int


def kernels(model: str, device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """The rate of a copy, then a row for every shape and phase, then one for the head; each product
    is repeated for so many seconds."""
    config = RandomCheckpoint.of(model).config
    text, group = config.thinker.text, config.quant.group_size if config.quant else 32
    rate = copy_rate(device, seconds)
    yield {"copy_bytes_per_s": rate}
    for shape in shapes(thinker_linears(config.thinker)):
        if shape.inputs % group or shape.outputs % 8:
            yield {"linear": shape.name, "left_out": f"not in groups of {group} and eights"}
            continue
        bench = Bench(shape, group, device, seconds)
        yield bench.decoding(rate)
        yield bench.prefill()
        del bench
    yield head_row(text.hidden_size, text.vocab_size, device, rate, seconds)


def shapes(linears: dict[str, tuple[int, int, bool]]) -> list[Shape]:
    """Those of one layer; all are alike."""
    dims = {name.rpartition(".")[2]: shape for name, shape in linears.items()}
    return [
        Shape("+".join(names), dims[names[0]][0], sum(dims[name][1] for name in names))
        for names in JOINED
    ]


class Bench:
    """One shape on a device: every kernel's weights, and how long products with them take."""

    def __init__(self, shape: Shape, group: int, device: str, seconds: float) -> None:
        self.shape, self.group, self.seconds = shape, group, seconds
        self.device = torch.device(device)
        self.scratch = Scratch()
        size = linear_bytes(shape.inputs, shape.outputs, group)
        self.copies = max(1, COPIES_BYTES.get(self.device.type, 0) // size)
        problem = Problem(self.device.type, torch.bfloat16, shape.inputs, shape.outputs, group)
        self.refused: dict[str, str] = {}
        self.held: dict[KernelName, list[dict[str, Tensor]]] = {}
        for name in OFFERED.get(self.device.type, ("reference",)):
            why = MODULES[name].refusal(problem)
            if why is not None:
                self.refused[name] = why
                continue
            prepare = MODULES[name].prepare
            self.held[name] = [prepare(*self._stored(), group) for _ in range(self.copies)]

    def _stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random words, zero points and scales."""
        shape, groups = self.shape, self.shape.inputs // self.group
        words = partial(torch.randint, -(2**31), 2**31 - 1, dtype=torch.int32, device=self.device)
        packed, zeros = (words((n, shape.outputs // 8)) for n in (shape.inputs, groups))
        steps = torch.rand(groups, shape.outputs, device=self.device)
        return packed, zeros, steps.mul_(0.02).half()

    def _run(self, name: KernelName, rows: int, phase: str) -> float:
        x = torch.randn(rows, self.shape.inputs, device=self.device).bfloat16()
        run = MODULES[name].run
        calls = [
            partial(run, x, held, None, self.group, phase, self.scratch) for held in self.held[name]
        ]
        return each_seconds(calls, self.device, self.seconds, short=rows == 1)

    def decoding(self, rate: float) -> dict[str, Any]:
        """One token."""
        took = {name: self._run(name, 1, "decode") for name in self.held}
        if "triton" in took:
            took["triton, unpacked for cuBLAS"] = self._run("triton", 1, "prefill")
        bound = linear_bytes(self.shape.inputs, self.shape.outputs, self.group) / rate
        return self._row("decode", 1, took) | {
            "bound_s": bound,
            "of_bound": {name: bound / seconds for name, seconds in took.items()},
        }

    def prefill(self) -> dict[str, Any]:
        """A prompt, beside the same product of 16-bit weights."""
        took = {name: self._run(name, PROMPT, "prefill") for name in self.held}
        shape = self.shape
        x = torch.randn(PROMPT, shape.inputs, device=self.device).bfloat16()
        dense = torch.randn(shape.outputs, shape.inputs, device=self.device).bfloat16()
        whole = each_seconds([lambda: F.linear(x, dense)], self.device, self.seconds)
        return self._row("prefill", PROMPT, took) | {
            "dense_s": whole,
            "of_dense": {name: whole / seconds for name, seconds in took.items()},
        }

    def _row(self, phase: str, rows: int, took: dict[Any, float]) -> dict[str, Any]:
        return {
            "linear": self.shape.name,
            "inputs": self.shape.inputs,
            "outputs": self.shape.outputs,
            "group": self.group,
            "phase": phase,
            "rows": rows,
            "seconds": took,
            "refused": self.refused,
        }


def head_row(inputs: int, outputs: int, device: str, rate: float, seconds: float) -> dict[str, Any]:
    """One token through an output layer of 16 bits, and of 8 where that is not the CPU's own."""
    place = torch.device(device)
    x = torch.randn(1, inputs, device=place).bfloat16()
    dense = torch.randn(outputs, inputs, device=place).bfloat16()
    took = {"16 bits": each_seconds([partial(F.linear, x, dense)], place, seconds, short=True)}
    packed = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=place)
    scales = torch.rand(outputs, device=place).bfloat16()
    product = eight_bits.product_of(place.type, x.dtype, inputs, outputs)
    call = partial(eight_bits.multiply, x, packed, scales, None, "decode", Scratch(), product)
    took["8 bits"] = each_seconds([call], place, seconds, short=True)
    return {
        "linear": "lm_head",
        "inputs": inputs,
        "outputs": outputs,
        "phase": "decode",
        "rows": 1,
        "seconds": took,
        "of_bound": {
            "16 bits": 2 * inputs * outputs / rate / took["16 bits"],
            "8 bits": inputs * outputs / rate / took["8 bits"],
        },
    }


def copy_rate(device: str, seconds: float) -> float:
    """Bytes a second that are read and written by a copy on the device."""
    place = torch.device(device)
    nbytes = (1 << 30) if place.type == "cuda" else (1 << 24)
    source = torch.zeros(nbytes, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    return 2 * nbytes / each_seconds([lambda: target.copy_(source)], place, seconds)


def each_seconds(
    calls: list[Callable[[], Tensor]],
    device: torch.device,
    seconds: float,
    *,
    short: bool = False,
) -> float:
    """How long one call takes, of several in turn. On CUDA those that are `short` are replayed as
    one graph, so that no time of the host is in it."""
    for _ in range(2):
        for call in calls:
            call()
    replay = partial(_all, calls)
    if short and device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _all(calls)
        replay = graph.replay
    _wait(device)
    begun, turns = time.perf_counter(), 0
    while turns == 0 or time.perf_counter() - begun < seconds:
        replay()
        turns += 1
        if turns % 8 == 1:
            _wait(device)
    _wait(device)
    return (time.perf_counter() - begun) / (turns * len(calls))


def _all(calls: list[Callable[[], Tensor]]) -> None:
    for call in calls:
        call()


def _wait(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device.type).synchronize()
