"""What a caller may set about quantizing. The command line takes its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from lowvram.errors import UsageError
from lowvram.quant import GROUPS

Method = Literal["awq", "awq+gptq", "rtn"]
METHODS: tuple[Method, ...] = get_args(Method)

COMPENSATED: Method = "awq+gptq"

BUILTIN, NONE = "builtin", "none"
"""Calibration that needs no files: the set made here, and no inputs at all."""


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """How a checkpoint is quantized; what changes the result, and `max_memory` and `device`.

    `method`: `awq` searches scales and ranges, `awq+gptq` then rounds so that errors make up for
    each other (which takes calibration), `rtn` rounds to the nearest. `calibration`: a folder of
    media and texts, a `.jsonl` file of conversations, `builtin`, or `none`. `samples`: at most so
    many conversations, each cut to its first `seq_len` tokens. `max_memory`: bytes of memory the
    work may take; activations beyond it wait on disk. None is what is free.
    """

    bits: int = 4
    group_size: int = 128
    method: Method = "awq"
    calibration: str = BUILTIN
    samples: int = 32
    seq_len: int = 512
    max_memory: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise UsageError(f"--bits {self.bits} is not made; wanted 4")
        if self.group_size not in GROUPS:
            raise UsageError(
                f"--group-size {self.group_size} is not made; wanted {', '.join(map(str, GROUPS))}"
            )
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}; wanted {', '.join(METHODS)}")
        if self.method == COMPENSATED and self.calibration == NONE:
            raise UsageError(
                f"--method {COMPENSATED} weighs errors by inputs; wanted --calibration other than "
                f"{NONE}, or --method awq"
            )
        for name, value, least in (("samples", self.samples, 1), ("seq-len", self.seq_len, 8)):
            if value < least:
                raise UsageError(f"--{name} {value} is too small; wanted at least {least}")

    def choices(self) -> dict[str, Any]:
        """What the bytes of the result depend on, besides the source and the calibration files."""
        names = ("bits", "group_size", "method", "samples", "seq_len", "seed")
        return {name: getattr(self, name) for name in names}
