"""What a plan takes of host memory, and where streamed layers wait. No torch."""

from __future__ import annotations

from lowvram.offload import format_size
from lowvram.planner.choices import Choice
from lowvram.planner.options import Option
from lowvram.planner.phases import Request
from lowvram.planner.streaming import SLABS, Source

HOST_RESERVE_BYTES = 2 * 2**30
"""Host memory that pinned copies must leave to everything else."""


def waiting_bytes(request: Request, choice: Choice) -> int:
    """Keys, values, embeddings and states that wait on the host of an accelerator."""
    if request.host_is_device:
        return 0
    total = request.host_states
    for part, option in choice.options.items():
        if option.kv == "host":
            total += request.kv_layer_bytes(part) * request.kv_layers(part)
        if option.kv == "host" or option.cut.streamed:
            total += request.between_layers(part)
    return total


def moved_per_pass(choice: Choice) -> int:
    """Bytes that stream in one pass through every part."""
    return sum(option.cut.moved for option in choice.options.values())


def copies_bytes(choice: Choice, source: Source) -> int:
    """Host memory for units that stream: all of them, or the ring they come through."""
    if source == "file":
        return 0
    return sum(_copies(option, source) for option in choice.options.values())


def _copies(option: Option, source: Source) -> int:
    if source == "pinned":
        return option.cut.moved
    return (SLABS + 1) * option.cut.slab_bytes if option.cut.streamed else 0


def source_for(device_type: str, moved: int, waiting: int, host_free: int) -> tuple[Source, str]:
    """Where units that stream `moved` bytes a pass wait, and why, in words."""
    if device_type == "cpu":
        return "file", "the file: the device is host memory"
    wanted = moved + waiting
    have = f"{format_size(host_free)} of host memory are free"
    if wanted + HOST_RESERVE_BYTES <= host_free:
        return "pinned", f"{format_size(moved)} of pinned copies: {have}"
    return "ring", (
        f"a pinned ring fed from the file: copies of {format_size(moved)} and "
        f"{format_size(HOST_RESERVE_BYTES)} beside them do not fit; {have}"
    )
