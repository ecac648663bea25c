"""How many keys a decode step reads that computes in one place, and what recording one takes.

No torch: the planner counts with it too.
"""

from __future__ import annotations

SWITCH = "LOWVRAM_GRAPHS"
"""Environment variable: `0` records no step. Each is launched then, and computes the same."""

RECORDING = frozenset({"cuda"})
"""Types of device whose steps compute in one place and can be recorded."""

SPAN = 1024
"""Keys by which the length grows that a step in one place reads: on the average half of these are
read for nothing, under 2 % of a published Talker's or Thinker's weights; each needs a recording."""

LONGEST = 8192
"""Keys of a cache up to which steps compute in one place. The attention that hides keys does not
split them among processors as the fused kernels do, which costs more than launches do beyond."""

WORKSPACE_BYTES = 32 << 20
"""The workspace of cuBLAS for a stream, such as one that records, on its largest devices. Not every
release of torch gives it back."""

SUMS_BYTES = 2 << 20
"""Of the scratch that a recorded step may go on using: parts of sums that are added later."""

_SEGMENT = 2 << 20  # what torch's allocator takes at a time for tensors under 1 MiB
_NODE = 8 << 10  # of the driver, for each kernel that a graph holds
_NODES = 40  # kernels of a layer


def in_place(device_type: str, max_tokens: int) -> bool:
    """Whether steps with a cache for that many tokens compute in one place, recorded or not. It
    depends on nothing else, so that a step computes the same whatever the budget."""
    return device_type in RECORDING and max_tokens <= LONGEST


def span_of(tokens: int, most: int) -> int:
    """Keys that a step reads which makes them `tokens`, in a cache for `most`."""
    return min(-(-tokens // SPAN) * SPAN, most)


def graph_bytes(layers: int, step_bytes: int) -> int:
    """What a recorded step of that many layers keeps on the device, at most; `step_bytes` is what
    the step takes for itself. The driver's share is assumed, not measured."""
    segments = 1 + -(-step_bytes // _SEGMENT)
    return WORKSPACE_BYTES + SUMS_BYTES + _SEGMENT * segments + _NODE * _NODES * layers
