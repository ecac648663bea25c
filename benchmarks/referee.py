"""A true-shape 3B-AWQ speaks on the CPU while the operating system enforces the stated budget.

    python benchmarks/referee.py FOLDER --budget 4GiB 2.5GiB minimum

FOLDER gets a checkpoint of random weights if it has none (6.5 GB, one minute). Each budget runs in
a child of its own with RLIMIT_DATA of the budget plus what a bare child takes that imports the
same, reads the same headers and tokenizer, and has computed something tiny of every kind, so that
its threads are started. The limit counts every private writable page from the moment it is
reserved, and ends in an error or in the end of the process, never in a slower run. The parent
watches from outside. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from quantize_memory import watched

from lowvram.checkpoint import resolve
from lowvram.conversation import MediaSettings, measure
from lowvram.errors import DoesNotFitError
from lowvram.offload import format_size, parse_size
from lowvram.planner import model_facts, plan_request
from lowvram.settings import GenerationSettings

MODEL = "Qwen2.5-Omni-3B-AWQ"
QUESTION = "What do you hear, what do you see, and what would you rather do today?"
ASKED = [{"role": "user", "content": QUESTION}]
MINIMUM = "minimum"
GROWTH_BYTES = 16 << 20
"""What the interpreter may take on top of its share while a request of the least budget runs: the
budget is lowered to what the limit leaves, and the least cannot be lowered."""
RESULTS = Path(__file__).parent / "results"

MALLOC = {"MALLOC_ARENA_MAX": "1"}
"""One heap for all threads: a second one takes address space of its own, which the limit counts."""


def started(folder: Path) -> None:
    """Import what a request imports, read what is no weight, and start every pool of threads."""
    import torch
    from torch.nn import functional

    import lowvram.omni  # noqa: F401

    checkpoint = resolve(folder)
    checkpoint.verify()
    checkpoint.tokenizer().encode(QUESTION)
    checkpoint.store.close()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(64, 64, dtype=dtype)
        functional.softmax(x @ x, -1)
        functional.conv1d(x[None], x[:, :, None])
    torch.ones(1 << 20).exp_().sort()


def share(folder: Path) -> int:
    """Bytes of data segment of a process that has done no more than `started`."""
    started(folder)
    return _vm_data()


def work(folder: Path, budget: int, limit: int, tokens: int, seconds: float) -> dict[str, Any]:
    """One reply under the limit, and what is known of it."""
    started(folder)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    from lowvram import LowVRAMOmni

    with LowVRAMOmni.from_pretrained(folder, max_memory=budget, device="cpu") as omni:
        options: Any = {"max_new_tokens": tokens, "return_audio": seconds > 0}
        if seconds:
            options["max_speech_seconds"] = seconds
        plan = omni.plan(ASKED, **options)
        try:
            result = omni.generate(ASKED, **options)
        except DoesNotFitError as error:
            return {"fits": False, "error": str(error), "plan": plan.to_json() | {"model": MODEL}}
        report = result.report
        return {
            "fits": True,
            "plan": plan.to_json() | {"model": MODEL},
            "predicted_peak_bytes": plan.predicted_peak_bytes,
            "measured_peak_bytes": report.measured_peak_bytes,
            "phases": [
                {
                    "name": row.name,
                    "seconds": row.seconds,
                    "predicted_peak_bytes": row.predicted_peak_bytes,
                    "measured_peak_bytes": row.measured_peak_bytes,
                }
                for row in report.phases
            ],
            "text": result.text,
            "reply_tokens": report.reply_tokens,
            "audio_seconds": report.audio_seconds,
            "first_text_s": report.first_text_s,
            "first_audio_s": report.first_audio_s,
            "total_s": report.total_s,
            "bytes_read": report.bytes_host_to_device,
            "notes": list(report.notes),
        }


def least(folder: Path, tokens: int, seconds: float) -> int:
    """The smallest budget for that reply, by the plan."""
    checkpoint = resolve(folder)
    shape = measure(
        ASKED,
        tokenizer=checkpoint.tokenizer(),
        config=checkpoint.config.thinker,
        settings=MediaSettings(),
        speech=seconds > 0,
        preprocessor=checkpoint.preprocessor,
    )
    checkpoint.store.close()
    settings = GenerationSettings(
        speech=seconds > 0, max_new_tokens=tokens, max_speech_seconds=seconds or None
    )
    return plan_request(model_facts(checkpoint), shape, settings, device="cpu").minimum_budget_bytes


def _vm_data() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))


def judged(
    folder: Path, budget: int, share_bytes: int, tokens: int, seconds: float
) -> dict[str, Any]:
    """One budget's run, seen from outside."""
    limit = budget + share_bytes
    line = [sys.executable, __file__, str(folder), "--child", "work"]
    line += [str(n) for n in (budget, limit, tokens, seconds)]
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        load = os.getloadavg()[0]
        code, peaks = watched(line, log)
        told = log.read_text(encoding="utf-8").splitlines()
    row = json.loads(told[-1]) if code == 0 and told else {"fits": None}
    spoke = bool(row.get("text")) and abs(row["audio_seconds"] - seconds) < 0.05
    return {
        "budget_bytes": budget,
        "limit_bytes": limit,
        "lived": code == 0,
        "exit_code": code,
        "answered": bool(row["fits"]) and spoke,
        "vm_data_peak_bytes": peaks["VmData"],
        "resident_peak_bytes": peaks["VmHWM"],
        "shared_peak_bytes": peaks["RssShmem"],
        "load_before_and_after": [load, os.getloadavg()[0]],
        **row,
    }


def shown(row: dict[str, Any], share_bytes: int) -> str:
    """One budget's lines for people."""
    name = f"budget {format_size(row['budget_bytes'])}: "
    if not row["lived"]:
        return f"{name}the process ended with {row['exit_code']}"
    if not row["fits"]:
        return f"{name}refused: {row['error']}"
    own = row["vm_data_peak_bytes"] - share_bytes
    residency = ", ".join(f"{part} {where}" for part, where in row["plan"]["residency"].items())
    return (
        f"{name}{row['reply_tokens']} tokens and {row['audio_seconds']:.2f} s of speech in "
        f"{row['total_s']:.1f} s (first text {_seconds(row['first_text_s'])}, first sound "
        f"{_seconds(row['first_audio_s'])})\n"
        f"  predicted peak {format_size(row['predicted_peak_bytes'])}, by our meter "
        f"{format_size(row['measured_peak_bytes'])}, by the system {format_size(own)} and "
        f"{format_size(share_bytes)} of the interpreter, of at most "
        f"{format_size(row['limit_bytes'])}\n"
        f"  {residency}"
    )


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help=f"a true-shape {MODEL}; made where it is missing")
    parser.add_argument("--budget", nargs="+", default=["4GiB", "2.5GiB"], metavar="SIZE")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument(
        "--max-speech", type=float, default=1.0, metavar="SECONDS", help="0: text only"
    )
    parser.add_argument("--json", type=Path, help="where the numbers go (default: results/)")
    given = parser.parse_args()
    if not (given.folder / "config.json").exists():
        from true_shape import main as write

        write(MODEL, str(given.folder))
    os.environ.update(MALLOC)
    line = [sys.executable, __file__, str(given.folder), "--child", "share"]
    share_bytes = int(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    rows = []
    for budget in given.budget:
        if budget == MINIMUM:
            size = least(given.folder, given.max_tokens, given.max_speech) + GROWTH_BYTES
        else:
            size = parse_size(budget)
        rows.append(judged(given.folder, size, share_bytes, given.max_tokens, given.max_speech))
        print(shown(rows[-1], share_bytes), flush=True)
    today = datetime.date.today().isoformat()
    path = given.json or RESULTS / f"referee-{today}.json"
    result = {
        "date": today,
        "model": f"{MODEL}, random weights",
        "interpreter_bytes": share_bytes,
        "environment": {**MALLOC, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "")},
        "cpus": os.cpu_count(),
        "runs": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0 if all(row["answered"] for row in rows) else 1


if __name__ == "__main__":
    if sys.argv[2:4] == ["--child", "share"]:
        print(share(Path(sys.argv[1])))
    elif sys.argv[2:4] == ["--child", "work"]:
        size, limit, tokens = map(int, sys.argv[4:7])
        print(json.dumps(work(Path(sys.argv[1]), size, limit, tokens, float(sys.argv[7]))))
    else:
        sys.exit(main())
