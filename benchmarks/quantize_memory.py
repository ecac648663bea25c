"""`quantize-checkpoint` at the 7B's true shapes under a hard limit on its data segment.

    python benchmarks/true_shape.py Qwen2.5-Omni-7B FOLDER/source        # 21 GB, random weights
    python benchmarks/quantize_memory.py FOLDER/source FOLDER/result \\
        --json benchmarks/results/quantize-memory-2026-11-21.json

The work runs in a child with RLIMIT_DATA of `--limit` plus what a bare child takes that imports the
same and has its threads started. It is stopped after `--layers` layers, by the callback that is
told of progress. The parent watches VmData and VmRSS while the child works.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

MEDIA = Path(__file__).parents[1] / "demos" / "media"
TOKENS = 512
"""Tokens of each calibration conversation; every one is long enough to be cut to that."""


class Enough(Exception):
    """The layers that were wanted are done."""


def conversations(count: int) -> Iterator[str]:
    """Lines of a calibration file: long texts, the first ones with a picture, sound and a clip."""
    from quality_model import docstrings

    texts = "\n\n".join(said for _, said in docstrings())
    media = [("image", "picture.png"), ("audio", "recording.flac"), ("video", "clip.mp4")]
    for index in range(count):
        start = index * 100_000
        content: list[dict[str, str]] = [
            {"type": "text", "text": texts[start : start + 8 * TOKENS]}
        ]
        if index < len(media):
            kind, name = media[index]
            content.insert(0, {"type": kind, kind: str(MEDIA / name)})
        yield json.dumps([{"role": "user", "content": content}])


def started() -> None:
    """Import what the command imports, and start its threads."""
    import torch

    import lowvram.cli.quantize
    import lowvram.quantize.driver  # noqa: F401

    torch.ones(1024, 1024) @ torch.ones(1024, 1024)


def share() -> int:
    """Bytes of data segment of a process that has done no more than `started`."""
    started()
    return _status(os.getpid())["VmData"]


def work(
    source: Path, destination: Path, method: Any, limit: int, memory: int, layers: int
) -> None:
    """Quantize the first layers under the limit; prints a JSON line for each and one at the end."""
    started()
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    from lowvram.quantize import Progress, QuantizeSettings, quantize_checkpoint

    calibration = destination.with_suffix(".jsonl")
    settings = QuantizeSettings(
        method=method,
        calibration=str(calibration),
        samples=len(calibration.read_text(encoding="utf-8").splitlines()),
        seq_len=TOKENS,
        max_memory=memory,
        device="cpu",
    )

    def told(at: Progress) -> None:
        row = {"stage": at.stage, "layer": at.layer, "wall": time.perf_counter()}
        row |= {"cpu": time.process_time(), "before": at.error_before, "after": at.error_after}
        print(json.dumps(row), flush=True)
        if at.stage == "layer" and at.layer == layers:
            raise Enough

    try:
        quantize_checkpoint(source, destination, settings, overwrite=True, on_progress=told)
    except Enough:
        return


def _status(pid: int) -> dict[str, int]:
    """The sizes of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if " kB" in line}


def _bare() -> int:
    line = [sys.executable, __file__, "--child", "share"]
    return int(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


def watched(line: list[str], log: Path) -> tuple[int, dict[str, int]]:
    """Run a child to its end; its exit code and the largest sizes that were seen, in bytes."""
    peaks = dict.fromkeys(("VmData", "VmHWM", "RssAnon", "RssShmem"), 0)
    with log.open("wb") as out, subprocess.Popen(line, stdout=out) as child:
        while child.poll() is None:
            try:
                now = _status(child.pid)
            except (OSError, IndexError):
                continue
            peaks = {name: max(peak, now.get(name, 0)) for name, peak in peaks.items()}
            time.sleep(0.03)
        return child.returncode, peaks


def told(log: Path, records: Path) -> list[dict[str, Any]]:
    """For each layer: the seconds of its search, and from the layer before to the end of it."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    kept = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines() if line]
    found = []
    for last, row in pairwise(rows):
        if row["stage"] != "layer":
            continue
        record = kept[row["layer"] - 1]
        found.append(
            {
                "layer": row["layer"] - 1,
                "search_seconds": record["seconds"],
                "error_before": row["before"],
                "error_after": row["after"],
                # Before the first layer lies the calibration.
                "seconds": row["wall"] - last["wall"] if last["stage"] == "layer" else None,
                "cpu_seconds": row["cpu"] - last["cpu"] if last["stage"] == "layer" else None,
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="a true-shape checkpoint")
    parser.add_argument("destination", type=Path, help="a folder that is made and removed")
    parser.add_argument("--limit", type=float, default=4.0, metavar="GIB", help="(default: 4)")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--method", default="awq", help="(default: awq)")
    parser.add_argument("--conversations", type=int, default=16, help=f"of {TOKENS} tokens each")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    given = parser.parse_args()
    memory, interpreter = int(given.limit * (1 << 30)), _bare()
    calibration = given.destination.with_suffix(".jsonl")
    calibration.write_text("\n".join(conversations(given.conversations)), encoding="utf-8")
    log, partial = given.destination.with_suffix(".log"), f"{given.destination.name}.partial"
    load = os.getloadavg()[0]
    numbers = [memory + interpreter, memory, given.layers]
    line = [sys.executable, __file__, "--child", "work", str(given.source), str(given.destination)]
    code, peaks = watched([*line, given.method, *map(str, numbers)], log)
    folder = given.destination.with_name(partial)
    result = {
        "exit_code": code,
        "method": given.method,
        "limit_bytes": memory + interpreter,
        "interpreter_bytes": interpreter,
        "peak_bytes": peaks,
        "source_bytes": sum(path.stat().st_size for path in given.source.iterdir()),
        "calibration_tokens": given.conversations * TOKENS,
        "calibration": json.loads((folder / "calibration.json").read_text(encoding="utf-8")),
        "layers": told(log, folder / "layers.jsonl"),
        "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "load_before_and_after": [load, os.getloadavg()[0]],
    }
    print(json.dumps(result, indent=2))
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder)
    for path in (calibration, log):
        path.unlink()
    return code


if __name__ == "__main__":
    if sys.argv[1:] == ["--child", "share"]:
        print(share())
    elif sys.argv[1:3] == ["--child", "work"]:
        work(Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5], *map(int, sys.argv[6:]))
    else:
        sys.exit(main())
