"""A checkpoint into four bits: layer by layer, resumable, the same bytes every time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowvram.errors import DoesNotFitError, LowVRAMError, UsageError
from lowvram.offload import format_size, open_device, out_of_memory
from lowvram.quantize.assemble import Assembly
from lowvram.quantize.job import Job, prepare_job
from lowvram.quantize.layers import LayerWork
from lowvram.quantize.plan import check_disk
from lowvram.quantize.progress import Note, OnProgress, Progress, silent
from lowvram.quantize.report import QuantizeReport
from lowvram.quantize.settings import QuantizeSettings
from lowvram.quantize.verify import compare
from lowvram.quantize.work import Workplace, clear, finished_report

SHARD_BYTES = 4 << 30
"""The most a file of the result holds (a larger tensor has a file of its own)."""


def quantize_checkpoint(
    model: str | Path,
    destination: str | Path,
    settings: QuantizeSettings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    offline: bool = False,
    shard_bytes: int = SHARD_BYTES,
    on_progress: OnProgress = silent,
    note: Note = silent,
) -> QuantizeReport:
    """Write `model` with its Thinker's linears in four bits to the new folder `destination`.

    It is made in `<destination>.partial` and renamed at the end. Interrupted at any moment, that
    folder goes on with `resume`, to the same bytes. `note` is told of what is left out.

    Raises:
        UsageError: places or options that are wrong, or differ from the interrupted run's.
        CheckpointError: a source that cannot be quantized, or that changed.
        MediaError: no calibration item can be read.
        DoesNotFitError: `max_memory` is too little for one layer, or memory ran out.
        LowVRAMError: no space on the disk, or another process at work.
    """
    begun = time.perf_counter()
    job = prepare_job(model, destination, settings or QuantizeSettings(), offline=offline)
    with job.source.checkpoint.store:
        device = open_device(job.settings.device)
        if device.type == "meta":
            raise UsageError("nothing can be quantized on meta; wanted cpu, cuda or npu")
        record = job.record(device.type)
        done = finished_report(job.destination, record) if resume else None
        seconds: list[float] = []
        if done is None:
            done, seconds = _work(job, record, resume, overwrite, shard_bytes, on_progress, note)
        else:
            clear(job.destination)
            note(f"{job.destination} is finished already")
        checked: Mapping[str, Any] = {}
        if verify:
            on_progress(Progress("verify", len(done["layers"]), len(done["layers"])))
            checked = compare(job, device, note)
    return QuantizeReport(
        destination=job.destination,
        job=record,
        layers=done["layers"],
        calibration=done["calibration"],
        result_bytes=sum(path.stat().st_size for path in job.destination.iterdir()),
        seconds=time.perf_counter() - begun,
        layer_seconds=seconds,
        verification=checked,
    )


def _work(
    job: Job,
    record: Mapping[str, Any],
    resume: bool,
    overwrite: bool,
    shard_bytes: int,
    on_progress: Callable[[Progress], None],
    note: Note,
) -> tuple[dict[str, Any], list[float]]:
    """Make the result; returns the report that lies in it, and the seconds of each layer."""
    with Workplace.open(job.destination, record, resume=resume, overwrite=overwrite) as place:
        try:
            check_disk(job.plan, job.destination.parent, place.held_bytes)
            assembly = Assembly(job, place, shard_bytes)
            on_progress(Progress("copy", 0, job.source.layers))
            assembly.copy_others()
            LayerWork(job, place, open_device(job.settings.device), on_progress, note).run()
            on_progress(Progress("finish", job.source.layers, job.source.layers))
            made = assembly.finish(record)
            place.publish()
        except OSError as error:
            raise LowVRAMError(
                f"cannot read or write {error.filename or place.folder}: "
                f"{error.strerror or error}; what is finished is kept: mend that, then go on with "
                "--resume"
            ) from error
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise DoesNotFitError(
                f"out of memory within a plan of {format_size(job.plan.memory)}; what is finished "
                "is kept: free some memory, then go on with --resume"
            ) from error
    return made
