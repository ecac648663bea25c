"""How many keys a recorded decode step reads, and what recording takes. No torch."""

from __future__ import annotations

SPAN = 1024
"""Keys by which the length grows that a recorded step reads: on the average half of these are read
for nothing, under 2 % of a published Talker's or Thinker's weights; each needs a recording."""

LONGEST = 8192
"""Keys of a cache up to which steps are recorded. The attention that hides keys does not split
them among processors as the fused kernels do, which costs more than launches do beyond this."""

_LIBRARIES = 32 << 20  # cuBLAS workspace of the stream that records, on its largest devices
_SEGMENT = 2 << 20  # what torch's allocator takes at a time for tensors under 1 MiB
_NODE = 8 << 10  # of the driver, for each kernel that a graph holds
_NODES = 40  # kernels of a layer


def span_of(tokens: int, most: int) -> int:
    """Keys that a step reads which makes them `tokens`, in a cache for `most`."""
    return min(-(-tokens // SPAN) * SPAN, most)


def graph_bytes(layers: int, step_bytes: int) -> int:
    """What a recorded step of that many layers keeps on the device, at most; `step_bytes` is what
    the step takes for itself. The driver's share is assumed, not measured."""
    segments = 1 + -(-step_bytes // _SEGMENT)
    return _LIBRARIES + _SEGMENT * segments + _NODE * _NODES * layers
