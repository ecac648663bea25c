"""Qwen2.5-Omni on a device with little memory: one number to set, and it is kept.

    from lowvram import LowVRAMOmni

    with LowVRAMOmni.from_pretrained("Qwen/Qwen2.5-Omni-7B-AWQ", max_memory="8GiB") as omni:
        result = omni.generate([{"role": "user", "content": "Hello!"}])

Names are imported when they are first used: `import lowvram` brings in neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowvram.chat import Chat
    from lowvram.errors import (
        CheckpointError,
        DeviceError,
        DoesNotFitError,
        LowVRAMError,
        MediaError,
        UsageError,
    )
    from lowvram.events import AudioChunk, Event, Finished, Result, TextDelta
    from lowvram.omni import LowVRAMOmni
    from lowvram.planner.plan import PhasePlan, Plan
    from lowvram.report import PhaseReport, Report

    __version__: str

__all__ = [
    "AudioChunk",
    "Chat",
    "CheckpointError",
    "DeviceError",
    "DoesNotFitError",
    "Event",
    "Finished",
    "LowVRAMError",
    "LowVRAMOmni",
    "MediaError",
    "PhasePlan",
    "PhaseReport",
    "Plan",
    "Report",
    "Result",
    "TextDelta",
    "UsageError",
    "__version__",
]

_HOMES = {
    "lowvram.chat": ("Chat",),
    "lowvram.errors": (
        "CheckpointError",
        "DeviceError",
        "DoesNotFitError",
        "LowVRAMError",
        "MediaError",
        "UsageError",
    ),
    "lowvram.events": ("AudioChunk", "Event", "Finished", "Result", "TextDelta"),
    "lowvram.omni": ("LowVRAMOmni",),
    "lowvram.planner.plan": ("PhasePlan", "Plan"),
    "lowvram.report": ("PhaseReport", "Report"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lowvram-omni")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lowvram.offload import defer_npu_autoload

    # What is imported next may import torch, which must not wake torch_npu.
    defer_npu_autoload()
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
