"""Requests about video, with speech, on an accelerator: every budget kept, and how fast it went.

    python benchmarks/accelerator.py --device cuda

Needs no download and writes no weights: random ones of the true shapes are made when they are read.
For each budget a process of its own runs requests of 15, 30 and 60 s of video (781 tokens a
second) that are answered in text and speech, so that the driver's context is measured each time and
the allocator starts empty; one more process measures how fast layers pass through slabs, against
plain pinned copies, and one how fast single products are by every kernel that the device has, for a
token and for a prompt. What does not fit into `--time-limit` is left out, and the table says so.

Works on cuda and npu; on cpu it runs as well, without a driver to ask: `--model pocket --device
cpu --seconds 1 --budget 1GiB` shows within seconds that it works.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram.offload import format_size, parse_size

MINIMUM = "minimum"
APART = 8 << 20
"""Bytes by which the contexts of two processes may differ: the driver tells in MiB."""
RESULTS = Path(__file__).parent / "results"
START_SECONDS = 15
"""No process is started for less."""

Ask = Callable[[Sequence[str], float], Iterator[dict[str, Any]]]
"""(job and its arguments, seconds it may take) -> its rows."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be measured."""

    model: str
    device: str
    budgets: tuple[str, ...]
    seconds: tuple[int, ...]
    max_tokens: int
    max_speech: float
    time_limit: float
    product_seconds: float

    def job(self, name: str, *more: object) -> list[str]:
        """The arguments of a job."""
        reply = (self.max_tokens, self.max_speech)
        return [name, self.model, self.device, *map(str, reply), *map(str, more)]


def children(job: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of a job as a process of its own prints them; it is ended when its time is over."""
    until = time.monotonic() + seconds
    line = [sys.executable, __file__, "--child", str(seconds), *job]
    with subprocess.Popen(line, stdout=subprocess.PIPE, bufsize=0) as child:
        assert child.stdout is not None
        while True:
            ready, _, _ = select.select([child.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                child.kill()
                yield {"left_out": "ended, its time was over"}
                return
            told = child.stdout.readline()
            if not told:
                break
            if told.startswith(b"{"):
                yield json.loads(told)
    if child.returncode:
        yield {"failed": f"the process ended with {child.returncode}"}


def run_job(job: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of a job, in this process."""
    from accelerator_case import Case, copies, facts, requests

    until = time.monotonic() + seconds
    name, model, device, tokens, speech, *more = job

    def case(video: str) -> Case:
        return Case(video_seconds=int(video), max_tokens=int(tokens), max_speech=float(speech))

    if name == "facts":
        yield facts(model, device, [case(video) for video in more])
    elif name == "kernels":
        from accelerator_kernels import kernels

        yield from kernels(model, device, float(more[0]))
    elif name == "requests":
        budget, *videos = more
        yield from requests(model, device, int(budget), [case(v) for v in videos], until)
    else:
        yield copies(model, device, passes=int(more[0]))


def measured(work: Work, ask: Ask) -> dict[str, Any]:
    """Everything that fits into the time."""
    begun, load = time.monotonic(), os.getloadavg()[0]

    def left() -> float:
        return work.time_limit - (time.monotonic() - begun)

    (facts,) = ask(work.job("facts", *work.seconds), left())
    if "device" not in facts:
        raise SystemExit(f"the device cannot be asked: {facts}")
    print(f"{work.model}, random weights, on {facts['device_name']}", flush=True)
    copied = next(ask(work.job("copies", 4), left()))
    print(_copies_line(copied), flush=True)
    products: list[dict[str, Any]] = []
    for row in (
        ask(work.job("kernels", work.product_seconds), left()) if left() > START_SECONDS else ()
    ):
        products.append(row)
        print(_product_line(row), flush=True)
    rows: list[dict[str, Any]] = []
    for budget, videos in _plan(work, facts):
        job = work.job("requests", budget, *videos)
        asked = ask(job, left()) if left() > START_SECONDS else iter(())
        found = []
        for row in asked:
            found.append({"budget_bytes": budget} | row)
            print(_request_line(found[-1]), flush=True)
        for video in videos[len(found) :]:
            found.append(
                {"budget_bytes": budget, "video_seconds": video, "left_out": "no time left"}
            )
            print(_request_line(found[-1]), flush=True)
        rows += found
    return {
        "date": datetime.date.today().isoformat(),
        "model": f"{work.model}, random weights",
        "reply": {"max_tokens": work.max_tokens, "max_speech_seconds": work.max_speech},
        **facts,
        "copies": copied,
        "products": products,
        "requests": rows,
        "seconds": time.monotonic() - begun,
        "load_before_and_after": [load, os.getloadavg()[0]],
    }


def _plan(work: Work, facts: dict[str, Any]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(budget in bytes, seconds of video), one for each process."""
    for budget in work.budgets:
        if budget != MINIMUM:
            yield parse_size(budget), work.seconds
            continue
        for video in work.seconds:
            yield facts["minimum_budget_bytes"][str(video)] + APART, (video,)


def _copies_line(row: dict[str, Any]) -> str:
    if "streamed_bytes_per_s" not in row:
        return f"copies: {row}"
    return (
        f"copies of {format_size(row['unit_bytes'])}: layers through slabs "
        f"{row['streamed_bytes_per_s'] / 1e9:.2f} GB/s, plain "
        f"{row['plain_copy_bytes_per_s'] / 1e9:.2f} GB/s"
    )


def _product_line(row: dict[str, Any]) -> str:
    if "seconds" not in row:
        return f"products: {row}"
    beside = row.get("of_bound") or row["of_dense"]
    what = "of memory's bound" if "of_bound" in row else "of 16-bit weights' speed"
    told = ", ".join(
        f"{name} {row['seconds'][name] * 1e6:,.0f} us ({beside[name]:.2f})" for name in beside
    )
    size = f"{row['linear']} {row['inputs']} x {row['outputs']}"
    return f"{row['phase']} of {row['rows']}, {size} ({what}): {told}"


def _request_line(row: dict[str, Any]) -> str:
    head = f"{format_size(row['budget_bytes']):>9}  {row.get('video_seconds', '?'):>3} s: "
    if "left_out" in row or "failed" in row:
        return head + (row.get("left_out") or row["failed"])
    if not row["fits"]:
        return head + row["error"]
    driver = row.get("driver_peak_bytes")
    return head + (
        f"driver's peak {'unknown' if driver is None else format_size(driver)}, predicted "
        f"{format_size(row['predicted_peak_bytes'])}, first text {row['first_text_s']:.2f} s, "
        f"first sound {row['first_audio_s']:.2f} s, {row['decode_tokens_per_s']:.1f} tokens/s, "
        f"all {row['total_s']:.1f} s"
    )


def broken(row: dict[str, Any]) -> bool:
    """Whether a request that ran took more than its budget, or did not end well."""
    peak = row.get("driver_peak_bytes") or 0
    return "failed" in row or peak > row["budget_bytes"] or row.get("sound") == "nan"


def main(arguments: Sequence[str] | None = None, ask: Ask = children) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-m", "--model", default="Qwen2.5-Omni-7B-AWQ", help="or `pocket`")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--budget", nargs="+", default=["12GiB", "8GiB", "6GiB", "4GiB", MINIMUM], metavar="SIZE"
    )
    parser.add_argument("--seconds", nargs="+", type=int, default=[15, 30, 60], help="of video")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--max-speech", type=float, default=4.0, metavar="SECONDS")
    parser.add_argument("--time-limit", type=float, default=540.0, metavar="SECONDS")
    parser.add_argument(
        "--product-seconds", type=float, default=0.3, metavar="SECONDS", help="for each of them"
    )
    parser.add_argument("--json", type=Path, help="where the numbers go (default: results/)")
    given = parser.parse_args(arguments)
    work = Work(
        model=given.model,
        device=given.device,
        budgets=tuple(given.budget),
        seconds=tuple(given.seconds),
        max_tokens=given.max_tokens,
        max_speech=given.max_speech,
        time_limit=given.time_limit,
        product_seconds=given.product_seconds,
    )
    result = measured(work, ask)
    kind = work.device.partition(":")[0]
    path = given.json or RESULTS / f"accelerator-{kind}-{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path} after {result['seconds']:.0f} s")
    return 1 if any(map(broken, result["requests"])) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        for told in run_job(sys.argv[3:], float(sys.argv[2])):
            print(json.dumps(told), flush=True)
    else:
        sys.exit(main())
