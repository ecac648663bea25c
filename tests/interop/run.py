"""Other programs read what is quantized here: `make interop`.

    python tests/interop/run.py [--environments FOLDER] [--only NAME ...]

Exit code 0 where every comparison that could be made is within its limit, and one was made. A
reader that cannot be installed is shown with the reason and fails nothing; one that is installed
and stops does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import Made, make, share
from environments import LEFT_OUT, READERS, NotInstalledError, Reader, install, last_line, versions
from safetensors.torch import load_file

from lowvram.bench.llama_file import write_gguf
from lowvram.cli.bench import shapes
from lowvram.config import OmniConfig

HERE = Path(__file__).resolve().parent
GROUPS = (128, 64, 32)
RUN_SECONDS = 900


@dataclass(frozen=True)
class Row:
    """One comparison, or the reason why there is none."""

    reader: str
    version: str
    what: str
    difference: float | None = None
    limit: float | None = None
    verdict: str = ""

    @property
    def failed(self) -> bool:
        return not self.verdict.startswith(("equal", "within", "not run"))


def judged(reader: str, version: str, what: str, difference: float, limit: float) -> Row:
    good = "equal" if difference == 0 else "within"
    verdict = good if difference <= limit else "DIFFERS"
    return Row(reader, version, what, difference, limit, verdict)


def read(reader: Reader, work: Path, environments: Path) -> list[Row]:
    """All that a reader's scripts find, each in a process of its own."""
    try:
        python = install(reader, environments)
        version = versions(reader, python)
    except (NotInstalledError, OSError, subprocess.CalledProcessError) as error:
        return [Row(reader.name, "-", "-", verdict=f"not run: {error}")]
    rows: list[Row] = []
    for script in reader.scripts:
        out, log = work / f"{script}.jsonl", work / f"{script}.log"
        command = [python, HERE / "readers" / f"{script}.py", work, out]
        failure = run(command, log)
        lines = out.read_text().splitlines() if out.exists() else []
        rows += [judged(reader.name, version, **json.loads(line)) for line in lines]
        if failure:
            rows.append(Row(reader.name, version, script, verdict=f"STOPPED: {failure}"))
    return rows


def run(command: list[str | Path], log: Path) -> str:
    """Why a script did not end well, or nothing. Its output is in `log`."""
    quiet = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=file, timeout=RUN_SECONDS, env=os.environ | quiet
            )
        except subprocess.TimeoutExpired:
            return f"took over {RUN_SECONDS} s"
    if not done.returncode:
        return ""
    print(*log.read_text().splitlines()[-20:], sep="\n", file=sys.stderr)
    return last_line(log.read_text())


def own_rows(made: list[Made]) -> list[Row]:
    """This package's engine on the packed linears, and how far rounding itself moves the logits."""
    rows = []
    for each in made:
        found = load_file(each.expected)
        true, moved = found["logits"], share(found["unquantized"], found["logits"])
        what = f"logits of packed linears, float32, g{each.group} (four bits move them {moved:.3f})"
        off = share(found["packed"], true)
        rows.append(judged("lowvram", "this", what, off, 1e-5))
    return rows


def table(rows: list[Row]) -> str:
    head = ("reader", "version", "compared", "difference", "limit", "verdict")
    cells = [head]
    for row in rows:
        difference = "-" if row.difference is None else f"{row.difference:.2g}"
        limit = "-" if row.limit is None else f"{row.limit:.2g}"
        cells.append((row.reader, row.version, row.what, difference, limit, row.verdict))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]])
        for line in cells
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, default=Path(".venv-interop"))
    parser.add_argument("--only", nargs="*", choices=[reader.name for reader in READERS])
    args = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    with tempfile.TemporaryDirectory(prefix="lowvram-interop-") as folder:
        work = Path(folder)
        print("quantizing the built-in model", file=sys.stderr, flush=True)
        rows = own_rows([make(work, group) for group in GROUPS])
        text = OmniConfig.from_dict(dict(shapes("pocket"))).thinker.text
        write_gguf(work / "random.gguf", text)
        for reader in READERS:
            if args.only is None or reader.name in args.only:
                print(reader.name, file=sys.stderr, flush=True)
                rows += read(reader, work, args.environments.resolve())
    others = [row for row in rows if row.reader != "lowvram" and row.difference is not None]
    rows += [Row(name, "-", "-", verdict=f"not run: {why}") for name, why in LEFT_OUT.items()]
    print(table(rows))
    if not others:
        print("error: no other reader could be run", file=sys.stderr)
    return int(not others or any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
