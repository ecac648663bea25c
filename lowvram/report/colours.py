"""Colours that stay apart for colour-blind readers (Okabe and Ito 2008), and stripes besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

GREY = "#9a9a9a"
_FIXED: Mapping[str, str] = {
    "context": "#d3d3d3",
    "text": "#0072b2",
    "talker": "#cc79a7",
    "token2wav": "#009e73",
    "audio": "#56b4e9",
    "visual": "#d55e00",
    "kv": "#f0e442",
    "carry": GREY,
    "workspace": "#6b6b6b",
    "activations": "#e69f00",
}
STRIPED = ("slabs", "carry", "workspace")
"""Owners whose bands are striped: they share a colour with what they belong to, or are grey."""


def colour(holder: str) -> str:
    """A weight's and a slab's colour is that of its module, any other's that of its owner."""
    owner, _, key = holder.partition("/")
    if owner == "kv" and key == "talker":
        return "#b9ad00"
    name = key if owner in ("weights", "slabs") else owner
    return _FIXED.get(name, GREY)


def striped(holder: str) -> bool:
    return holder.partition("/")[0] in STRIPED


def readable_on(background: str) -> str:
    """Black or white, whichever is the easier to read there."""
    red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "white"


def stack(levels: Sequence[int]) -> list[tuple[int, int]]:
    """Bottom and top of each band."""
    edges = [0]
    for level in levels:
        edges.append(edges[-1] + level)
    return list(pairwise(edges))
