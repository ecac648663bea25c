"""Triton's kernels compiled for GPUs that are not there: what each would take of a processor.

    python benchmarks/triton_aot.py

Every tile of the table, for every group in bfloat16 and the usual one in float16, for compute
capabilities 8.0, 8.6, 8.9, 9.0 and 12.0: registers a thread, spills, shared memory, and whether
the widest loads are used. Compiled by the ptxas that comes with Triton; no GPU is needed, and none
is measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowvram.quant.triton import tuning
from lowvram.quant.triton.dot import four_bits_by_tiles
from lowvram.quant.triton.gemv import four_bits
from lowvram.quant.triton.reduce import add_parts
from lowvram.quant.triton.rows import eight_bits
from lowvram.quant.triton.unpack import to_16_bits

RESULTS = Path(__file__).parent / "results"
CAPABILITIES = (80, 86, 89, 90, 120)
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Shared memory that one program can have (CUDA programming guide, technical specifications)."""

SPILLED = 32
"""Bytes a thread that a tile for several rows may spill: a few registers. Those for one may not."""

REGISTERS = 65_536
"""Of a processor, 32 bits each."""

POINTERS = {"x": None, "qweight": "i32", "qzeros": "i32", "weights": "i8", "parts": "fp32"}
"""What pointers point to; those not named, and `x`, to the type of the activations."""

LARGEST = {"bf16": float.fromhex("0x1.fep127"), "fp16": 65504.0}
"""Numbers of each type."""

ALIGNED = {"inputs", "words", "outputs", "width", "first"}
"""Integers that are multiples of 16 in all linears of the 3B and the 7B."""


@dataclass(frozen=True)
class Case:
    """A kernel with everything that is decided before it is compiled."""

    name: str
    kernel: Any
    dtype: str
    scales: str
    constants: tuple[tuple[str, Any], ...]
    warps: int = tuning.WARPS

    def source(self) -> ASTSource:
        constants = dict(self.constants)
        signature: dict[str, str] = {}
        attributes = {}
        for index, name in enumerate(self.kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
                continue
            if name in ("x", "qweight", "qzeros", "scales", "weights", "bias", "out", "parts"):
                kind = self.scales if name == "scales" else POINTERS.get(name) or self.dtype
                if name == "out" and constants.get("DIRECT") is False:
                    kind = "fp32"
                signature[name] = f"*{kind}"
            else:
                signature[name] = "i32"
            if signature[name].startswith("*") or name in ALIGNED:
                attributes[index,] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


def case(kernel: Any, dtype: str, scales: str, tile: Any, **constants: Any) -> Case:
    """A case of a tile of the table."""
    fields = tile._asdict()
    warps = fields.pop("warps", tuning.WARPS)
    values = {name.upper(): value for name, value in fields.items()} | constants
    if "bias" in kernel.arg_names and not values.get("DIRECT", True):
        values["bias"] = None
    shown = [f"{key}={value}" for key, value in values.items() if key.isupper()]
    name = f"{kernel.__name__} {dtype} {scales} {' '.join(shown)}"
    return Case(name, kernel, dtype, scales, tuple(values.items()), warps)


def main_cases() -> list[Case]:
    """What decoding and prefill of a 7B in bfloat16 run."""
    return [
        case(four_bits, "bf16", "fp16", tuning.gemv(1, 3584, 128), GROUP=128, DIRECT=False),
        case(four_bits, "bf16", "fp16", tuning.gemv(1, 37888, 128), GROUP=128, DIRECT=False),
        case(four_bits_by_tiles, "bf16", "fp16", tuning.dot(64, 128), GROUP=128, DIRECT=False),
        case(to_16_bits, "bf16", "fp16", tuning.UNPACK, GROUP=128, LARGEST=LARGEST["bf16"]),
        case(eight_bits, "bf16", "bf16", tuning.rows(1), DIRECT=True, bias=None),
        _added("bf16", gated=True),
        _added("bf16", gated=False, biased=True),
    ]


def all_cases() -> Iterator[Case]:
    """Every tile of the table, in both types; unsplit ones and float16 in groups of 128 alone."""
    for dtype, largest in LARGEST.items():
        for group in (128,) if dtype == "fp16" else (32, 64, 128):
            for direct in (False, True) if group == 128 else (False,):
                for count, outputs in ((1, 3584), (1, 37888), (2, 3584), (4, 3584), (8, 3584)):
                    tile = tuning.gemv(count, outputs, group)
                    yield case(four_bits, dtype, "fp16", tile, GROUP=group, DIRECT=direct)
                for count in (16, 32, 64):
                    tile_of_dot = tuning.dot(count, group)
                    yield case(
                        four_bits_by_tiles, dtype, "fp16", tile_of_dot, GROUP=group, DIRECT=direct
                    )
            yield case(to_16_bits, dtype, "fp16", tuning.UNPACK, GROUP=group, LARGEST=largest)
        for count in (1, 2, 4, 8):
            yield case(eight_bits, dtype, "bf16", tuning.rows(count), DIRECT=True)
        for biased in (False, True):
            yield _added(dtype, gated=True, biased=biased)
            yield _added(dtype, gated=False, biased=biased)


def _added(dtype: str, *, gated: bool, biased: bool = False) -> Case:
    constants = {"BLOCK": tuning.REDUCED, "GATED": gated, "LARGEST": LARGEST[dtype]}
    constants |= {} if biased else {"bias": None}
    name = f"add_parts {dtype} {gated=} {biased=}"
    return Case(name, add_parts, dtype, "fp16", tuple(constants.items()))


def compiled(one: Case, capability: int) -> dict[str, Any]:
    """What it takes on a GPU of that capability.

    Raises:
        triton.CompilationError: it cannot be compiled for that.
    """
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(one.source(), target=target, options={"num_warps": one.warps})
    ptx = made.asm["ptx"]
    return {
        "case": one.name,
        "warps": one.warps,
        "capability": capability,
        "cubin_bytes": len(made.asm["cubin"]),
        "shared_bytes": made.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "flushed": ptx.count(".ftz"),
        **usage(made.asm["cubin"]),
    }


def usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of local memory (spills among them), as cuobjdump tells."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"]}


def programs(row: dict[str, Any]) -> int:
    """Programs that a processor's registers hold at once; they are given out in eights."""
    return int(REGISTERS // (-(-row["registers"] // 8) * 8 * 32 * row["warps"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where the numbers go (default: results/)")
    parser.add_argument("--main", action="store_true", help="only what a 7B in bfloat16 runs")
    given = parser.parse_args(arguments)
    rows = []
    for one in main_cases() if given.main else all_cases():
        for capability in CAPABILITIES:
            row = compiled(one, capability)
            rows.append(row | {"programs": programs(row)})
            print(json.dumps(rows[-1]), flush=True)
    date = datetime.date.today().isoformat()
    result = {
        "date": date,
        "triton": triton.__version__,
        "rows": rows,
    }
    path = given.json or RESULTS / f"triton-aot-{date}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    spilled = [row["spilled_bytes"] for row in rows if row["spilled_bytes"]]
    most = max(spilled, default=0)
    print(f"{len(rows)} compiled, {len(spilled)} spill, at most {most} bytes; written to {path}")
    return 1 if most > SPILLED else 0


if __name__ == "__main__":
    sys.exit(main())
