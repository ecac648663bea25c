"""The driver behind `quantize-checkpoint`: calibration through the Thinker, layers one by one.

Names that need torch are imported when first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowvram.quantize.driver import quantize_checkpoint
    from lowvram.quantize.job import Job, prepare_job
    from lowvram.quantize.plan import QuantizePlan
    from lowvram.quantize.progress import Progress
    from lowvram.quantize.report import QuantizeReport
    from lowvram.quantize.settings import BUILTIN, METHODS, QuantizeSettings

__all__ = [
    "BUILTIN",
    "METHODS",
    "Job",
    "Progress",
    "QuantizePlan",
    "QuantizeReport",
    "QuantizeSettings",
    "prepare_job",
    "quantize_checkpoint",
]

_HOMES = {
    "driver": ("quantize_checkpoint",),
    "job": ("Job", "prepare_job"),
    "plan": ("QuantizePlan",),
    "progress": ("Progress",),
    "report": ("QuantizeReport",),
    "settings": ("BUILTIN", "METHODS", "QuantizeSettings"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
