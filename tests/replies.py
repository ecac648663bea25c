"""Replies of small models: asked for with all memory or with the least, and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lowvram import LowVRAMOmni, Result


def open_model(
    folder: Path, asked: list[dict[str, Any]], options: dict[str, Any], *, tight: bool
) -> LowVRAMOmni:
    """The model on the CPU; `tight` gives it the smallest budget that does for the request, with
    which layers stream."""
    if not tight:
        return LowVRAMOmni.from_pretrained(folder, device="cpu")
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as first:
        least = first.plan(asked, **options).minimum_budget_bytes
    return LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory=least)


def same_reply(one: Result, other: Result) -> bool:
    """Token for token, code for code, sample for sample."""
    return (
        one.tokens == other.tokens
        and one.codes == other.codes
        and np.array_equal(one.audio, other.audio)  # type: ignore[arg-type]
    )


def held(omni: LowVRAMOmni) -> dict[str, int]:
    """What is on the device, the CPU, by owner; without what every request makes alike, which stays
    on the host."""
    kept, found = omni._constants.nbytes, omni._meter.held()
    carried = found.pop("carry", 0)
    assert carried == kept
    return found
