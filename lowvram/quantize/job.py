"""A job before the work: the source checked, the calibration set found, the plan made. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram.checkpoint import resolve
from lowvram.errors import CheckpointError, UsageError
from lowvram.quantize.calibration import CalibrationSet, find_calibration
from lowvram.quantize.plan import QuantizePlan, plan_quantization
from lowvram.quantize.settings import QuantizeSettings
from lowvram.quantize.source import Source, check_places, check_source

_FORM = 2
"""Changes whenever the same job gives other bytes."""


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be done. Whoever made it closes `source.checkpoint.store`."""

    source: Source
    found: CalibrationSet
    settings: QuantizeSettings
    plan: QuantizePlan
    destination: Path

    def record(self, device: str) -> dict[str, Any]:
        """All that the bytes of the result depend on; `device` is the kind of the device."""
        return {
            "form": _FORM,
            "source": self.source.digest(),
            **self.settings.choices(),
            "calibration": self.found.name,
            "calibration files": self.found.digest,
            "device": device,
        }


def prepare_job(
    model: str | Path,
    destination: str | Path,
    settings: QuantizeSettings,
    *,
    offline: bool = False,
) -> Job:
    """Check everything that headers and names can tell. Nothing is written.

    Raises:
        UsageError, CheckpointError: places, options or a source that will not do.
        DoesNotFitError: `max_memory` is too little.
    """
    destination = Path(os.path.abspath(Path(destination).expanduser()))
    if not destination.name:
        raise UsageError(f"{destination} has no name; wanted a new folder for the result")
    if destination.is_file():
        raise UsageError(f"{destination} is a file; wanted a new folder for the result")
    if not destination.parent.is_dir():
        raise UsageError(f"there is no folder {destination.parent} to put the result into")
    found = find_calibration(settings)
    checkpoint = resolve(model, offline=offline)
    try:
        check_places(checkpoint.folder, destination)
        source = check_source(checkpoint, settings.group_size)
        plan = plan_quantization(source, destination, settings, found)
    except (CheckpointError, UsageError, OSError):
        checkpoint.store.close()
        raise
    return Job(source, found, settings, plan, destination)
