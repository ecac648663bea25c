"""Triton's kernels interpreted on every whole linear of the 3B and the 7B, without a GPU.

    python benchmarks/triton_shapes.py

Each against `(q - zero) * scale` times the input in float64: one row and nine rows as decoding has
them, and a prompt's, for linears alone and joined. Tiles are large, for an interpreter takes as
long for a small one; the tests have those of the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from interpreted import BOUND, activations, error, linear  # noqa: E402

from lowvram.quant.triton import tuning  # noqa: E402
from lowvram.specs import SPECS  # noqa: E402
from lowvram.tensors import thinker_linears  # noqa: E402


def shapes() -> list[tuple[int, int]]:
    """(inputs, outputs) of every linear, and of those that are joined."""
    found: set[tuple[int, int]] = set()
    for spec in SPECS.values():
        dims = {
            name.rpartition(".")[2]: shape[:2]
            for name, shape in thinker_linears(spec.config.thinker).items()
        }
        found |= set(dims.values())
        for joined in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            found.add((dims[joined[0]][0], sum(dims[name][1] for name in joined)))
    return sorted(shape for shape in found if shape[0] >= 2048)


def rows() -> Iterator[dict[str, Any]]:
    """One for every shape and way of computing it."""

    def gemv(count: int, outputs: int, group: int) -> tuning.Gemv:
        return tuning.Gemv(1, group, 512, 1)

    def dot(count: int, group: int) -> tuning.Dot:
        return tuning.Dot(16, group, 512, 4)

    large = {"gemv": gemv, "dot": dot, "UNPACK": tuning.Unpack(128, 512)}
    with mock.patch.multiple(tuning, **large):
        for inputs, outputs in shapes():
            packed = linear(inputs, outputs, 128, bias=torch.bfloat16)
            for count, phase in ((1, "decode"), (9, "decode"), (3, "prefill")):
                x, begun = activations(count, inputs, torch.bfloat16), time.perf_counter()
                found = packed.found(x, phase)
                seconds = time.perf_counter() - begun
                yield {
                    "inputs": inputs,
                    "outputs": outputs,
                    "rows": count,
                    "phase": phase,
                    "error": error(found, packed.wanted(x)),
                    "seconds": seconds,
                }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where the numbers go (default: results/)")
    given = parser.parse_args()
    load, begun, found = os.getloadavg()[0], time.monotonic(), []
    for row in rows():
        print(json.dumps(row), flush=True)
        found.append(row)
    date = datetime.date.today().isoformat()
    result = {
        "date": date,
        "torch": torch.__version__,
        "seconds": time.monotonic() - begun,
        "load_before_and_after": [load, os.getloadavg()[0]],
        "rows": found,
    }
    path = given.json or RESULTS / f"triton-shapes-{date}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    worst = max(row["error"] for row in found)
    print(f"{len(found)} products, the largest error {worst:.2g}; written to {path}")
    return 0 if worst < BOUND[torch.bfloat16] else 1


if __name__ == "__main__":
    sys.exit(main())
