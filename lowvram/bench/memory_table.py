"""The cases of `bench memory` side by side, as text and as the table of the README. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Cases = Sequence[Mapping[str, Any]]
"""As `bench memory --json` prints them."""

NAMES = {
    "stock": "official demo, measured",
    "resident": "every layer stays",
    "kv-host": "KV on the host",
    "minimum": "smallest budget",
}
HEADINGS = ("video", "prompt tokens", "official demo, published", *NAMES.values())


def memory_table(cases: Cases) -> str:
    """A line for each length: GiB measured, and in brackets GiB predicted; then the growth."""
    rows = [HEADINGS, *(_cells(cases, length, predicted=True) for length in _lengths(cases))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines += ["", "GiB measured, in brackets GiB predicted"]
    if growth := _growth(cases):
        told = (f"{NAMES[mode]} {size / 1024:.1f} KiB" for mode, size in growth.items())
        lines.append(f"each further token of the prompt: {', '.join(told)}")
    return "\n".join(lines)


def markdown_table(cases: Cases) -> str:
    """The same for the README, without what was predicted; the growth is its last line."""
    rows = [
        HEADINGS,
        ("---",) * len(HEADINGS),
        *(_cells(cases, length, predicted=False) for length in _lengths(cases)),
    ]
    if growth := _growth(cases):
        told = (f"{growth[mode] / 1024:.1f} KiB" if mode in growth else "" for mode in NAMES)
        rows.append(("each further token", "", "", *told))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _lengths(cases: Cases) -> list[int]:
    return sorted({case["video_seconds"] for case in cases})


def _cells(cases: Cases, length: int, *, predicted: bool) -> tuple[str, ...]:
    found = {case["mode"]: case for case in cases if case["video_seconds"] == length}
    one = next(iter(found.values()))
    published = one["reference_bytes"]
    cells = [f"{length} s", f"{one['prompt_tokens']:,}", _gib(published) if published else "-"]
    for mode in NAMES:
        cell = "-"
        if mode in found:
            cell = _gib(found[mode]["measured_peak_bytes"])
            if predicted:
                cell += f" ({_gib(found[mode]['predicted_peak_bytes'])})"
        cells.append(cell)
    return tuple(cells)


def _growth(cases: Cases) -> dict[str, float]:
    """Bytes that a token adds, from the shortest prompt to the longest, by mode."""
    found = {}
    for mode in NAMES:
        points = sorted(
            (case["prompt_tokens"], case["measured_peak_bytes"])
            for case in cases
            if case["mode"] == mode
        )
        if len(points) > 1 and points[-1][0] > points[0][0]:
            (few, low), (many, high) = points[0], points[-1]
            found[mode] = (high - low) / (many - few)
    return found


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f}"
