"""Which units of a part stay on the device and which come through slabs. No torch."""

from __future__ import annotations


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` places, as evenly as whole numbers allow, the first place among them.

    For the units that stream: while one that stays is computed with, the next one can arrive, and
    the first arrives while the step before it is drawn.
    """
    return tuple(i * total // count for i in range(count))
