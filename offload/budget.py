"""Sizes as people write them, and what of a budget is left for the engine to use.

Imports neither torch nor numpy, so that the command line can check an argument at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real

from lowvram.errors import UsageError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

# A bare letter is binary, as it is for containers, Java and `ulimit`; "GB" is decimal, as the SI
# says. A card sold as 8 GB has 8 GiB, so reading "8GB" as 8e9 errs on the side that fits.
_UNITS = {
    "": 1,
    "b": 1,
    "byte": 1,
    "bytes": 1,
    **{letter: 1 << 10 * (i + 1) for i, letter in enumerate("kmgt")},
    **{letter + "ib": 1 << 10 * (i + 1) for i, letter in enumerate("kmgt")},
    **{letter + "b": 1000 ** (i + 1) for i, letter in enumerate("kmgt")},
}
_SIZE = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z]*)\s*")
_FORMS = "a number of bytes or a size such as 8GiB, 8G (= GiB), 8GB (= 8,000,000,000 bytes), 512MiB"
_LIMIT = 1 << 63  # sizes travel as int64

GUARD_FLOOR = 64 * MIB
GUARD_SHARE = 0.02


def parse_size(value: str | int | float) -> int:
    """Bytes in `value`: a number of bytes, or text with a unit (K, M, G, T; KiB...; KB...).

    A fraction of a byte is cut off. Raises `UsageError` for anything else: a negative, zero or
    endless number, an unknown unit, 2**63 bytes or more.
    """
    number = _from_text(value) if isinstance(value, str) else _from_number(value)
    if number is None:
        raise UsageError(f"{_shown(value)} is not a size; wanted {_FORMS}")
    if number < 1:
        raise UsageError(f"the size {_shown(value)} is below one byte; wanted {_FORMS}")
    if number >= _LIMIT:
        raise UsageError(f"the size {_shown(value)} is beyond any memory; wanted {_FORMS}")
    return int(number)


def _from_text(text: str) -> Decimal | None:
    found = _SIZE.fullmatch(text) if len(text) <= 64 else None
    if found is None or found[2].lower() not in _UNITS:
        return None
    return Decimal(found[1]) * _UNITS[found[2].lower()]


def _from_number(value: object) -> Decimal | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return Decimal(int(value))
    if isinstance(value, Real) and math.isfinite(value):
        return Decimal(float(value))
    return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def format_size(nbytes: int, *, round_up: bool = False) -> str:
    """`nbytes` in the largest binary unit it fills: "7.25 GiB", "64.5 MiB", "12 KiB", "8 bytes".

    At most two decimals, and one from 100 on. `round_up` never shows less than there is, so that
    a size a message tells the reader to pass is one that works.
    """
    if nbytes < 0:
        return "-" + format_size(-nbytes)
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            step = 10 if nbytes >= 100 * unit else 100
            scaled = -(-nbytes * step // unit) if round_up else (nbytes * step + unit // 2) // unit
            return f"{scaled / step:.2f}".rstrip("0").rstrip(".") + f" {name}"
    return f"{nbytes} byte" + ("s" if nbytes != 1 else "")


def guard_bytes(budget: int) -> int:
    """Bytes kept back for segment rounding and kernels loaded late: 64 MiB, or 2 % if more."""
    return max(GUARD_FLOOR, int(budget * GUARD_SHARE))


@dataclass(frozen=True)
class Budget:
    """One number to keep, and what is taken from it before the engine may use the rest (bytes)."""

    budget_bytes: int
    context_bytes: int
    guard_bytes: int

    @property
    def usable(self) -> int:
        """Bytes for weights, caches and activations together; 0 when nothing is left."""
        return max(0, self.budget_bytes - self.context_bytes - self.guard_bytes)
