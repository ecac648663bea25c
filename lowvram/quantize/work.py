"""The folder beside the result in which it is made: what is finished, and how to go on.

Everything in it is written aside and renamed, so that whatever has its name is whole. The result
gets its own name by one rename, at the very end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lowvram.errors import CheckpointError, LowVRAMError, UsageError
from lowvram.quantize.shards import Entry, write_shard, write_text

REPORT = "quantization.json"
_JOB, _LOCK, _LINES = "job.json", "lock", "layers.jsonl"


class Workplace:
    """The unfinished result of one job. Close it, or use it as a context manager."""

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        self.folder = work_folder(destination)
        self.out = self.folder / "out"
        self.spill = self.folder / "spill"
        self._old = self.folder / "old"
        self._lock: IO[bytes] | None = None

    @classmethod
    def open(
        cls, destination: Path, job: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> Workplace:
        """The place for `job`; with `resume`, the one that an interrupted run of it left.

        Raises:
            UsageError: something is there that is neither to be gone on with nor overwritten, or
                the options differ from the interrupted run's.
            CheckpointError: the source differs from the interrupted run's.
            LowVRAMError: another process is at work there.
        """
        place = cls(destination)
        if destination.exists() and not overwrite:
            raise UsageError(f"{destination} exists; wanted a new name, or --overwrite")
        if place.folder.exists() and not (resume or overwrite):
            raise UsageError(
                f"{place.folder} holds an interrupted run; go on with --resume, or begin anew with "
                "--overwrite"
            )
        place.folder.mkdir(exist_ok=True)
        place._take()
        try:
            place._begin(job, resume)
        except BaseException:
            place.close()
            raise
        return place

    def _begin(self, job: Mapping[str, Any], resume: bool) -> None:
        saved = _read_json(self.folder / _JOB)
        if resume and saved is not None:
            _compare(saved, job, self.folder)
        else:
            self._discard()
            write_text(self.folder / _JOB, json.dumps(job, indent=2))
        self.out.mkdir(exist_ok=True)
        shutil.rmtree(self.spill, ignore_errors=True)

    def _discard(self) -> None:
        """Forget an interrupted run; what it had moved aside goes back to its place."""
        if self._old.exists() and not self.destination.exists():
            self._old.rename(self.destination)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()

    def _take(self) -> None:
        """Keep other processes out; where the system has no such locks, trust the user."""
        try:
            import fcntl
        except ImportError:
            return
        self._lock = (self.folder / _LOCK).open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise LowVRAMError(
                f"another process is at work in {self.folder}; wait for it, or stop it"
            ) from error

    @property
    def held_bytes(self) -> int:
        """Bytes of the work that are on the disk already."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files if self._old not in path.parents)

    def finished(self) -> list[dict[str, Any]]:
        """The records of the layers that are done, from the first on; each file is whole."""
        records: list[dict[str, Any]] = []
        with suppress(FileNotFoundError):
            for line in (self.folder / _LINES).read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # a line that was cut short
                    record = json.loads(line)
                    if record["layer"] == len(records) and self._is_whole(record):
                        records.append(record)
        return records

    def _is_whole(self, record: Mapping[str, Any]) -> bool:
        path = self.layer_file(record["layer"])
        return path.exists() and _sha256(path) == record["sha256"]

    def layer_file(self, layer: int) -> Path:
        return self.folder / "layers" / f"{layer:05d}.safetensors"

    def add_layer(self, layer: int, entries: Sequence[Entry], record: Mapping[str, Any]) -> None:
        """Write a finished layer, then the line that says so."""
        path = self.layer_file(layer)
        path.parent.mkdir(exist_ok=True)
        write_shard(path, entries)
        line = json.dumps({"layer": layer, **record, "sha256": _sha256(path)})
        with (self.folder / _LINES).open("a", encoding="utf-8") as lines:
            # A line that was cut short before must not swallow this one.
            lines.write(f"\n{line}\n" if lines.tell() else f"{line}\n")
            lines.flush()
            os.fsync(lines.fileno())

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep a JSON object for a later run; see `saved`."""
        write_text(self.folder / name, json.dumps(content))

    def saved(self, name: str) -> dict[str, Any]:
        """What `save` kept under that name; empty where nothing was."""
        return _read_json(self.folder / name) or {}

    def publish(self) -> None:
        """Give the whole result its name, and clear away the rest."""
        if self.destination.exists() and self.out.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            self.destination.rename(self._old)
        self.out.rename(self.destination)
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def work_folder(destination: Path) -> Path:
    """Where `destination` is made."""
    return destination.with_name(f"{destination.name}.partial")


def clear(destination: Path) -> None:
    """Remove what a run left that was stopped after the result had its name."""
    shutil.rmtree(work_folder(destination), ignore_errors=True)


def finished_report(destination: Path, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report in `destination`, if that is the whole result of this very job."""
    report = _read_json(destination / REPORT)
    return report if report is not None and report.get("job") == dict(job) else None


def _compare(saved: Mapping[str, Any], job: Mapping[str, Any], folder: Path) -> None:
    again = f"use the same, or begin anew with --overwrite ({folder})"
    if saved.get("source") != job["source"]:
        raise CheckpointError(
            f"the source is not the one that the interrupted run began with; {again}"
        )
    changed = [name for name in job if saved.get(name) != job[name]]
    if changed:
        name = changed[0]
        raise UsageError(
            f"{name} is {job[name]!r}, but the interrupted run began with {saved.get(name)!r}; "
            f"{again}"
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
