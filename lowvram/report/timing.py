"""What a listener hears of the times at which sound arrived."""

from __future__ import annotations

from collections.abc import Sequence


def longest_gap(arrivals: Sequence[float], lengths: Sequence[float]) -> float | None:
    """The longest silence, in seconds, between pieces that arrive at those times and last so long.

    The first piece is played when it arrives, each other one when it is there and the one before
    has ended. 0 where nobody waits, None where there is no piece.
    """
    if not arrivals:
        return None
    longest, played = 0.0, arrivals[0]
    for arrived, length in zip(arrivals, lengths, strict=True):
        longest = max(longest, arrived - played)
        played = max(arrived, played) + length
    return longest
