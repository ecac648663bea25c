"""`lowvram-demo bench decode`: how fast this machine decodes, at a model's true shapes."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.cli.output import Console, print_json
from lowvram.errors import UsageError
from lowvram.planner import check_options
from lowvram.specs import POCKET, SPECS, find_spec

if TYPE_CHECKING:
    from lowvram.bench.decode import Row


def main(args: Namespace, console: Console) -> int:
    if args.device not in ("auto", "cpu"):
        raise UsageError(f"bench decode measures the CPU, not {args.device}; use --device cpu")
    check_options(args.allow)
    raw = shapes(args.model)
    import torch

    from lowvram.bench.decode import bench_decode

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows = bench_decode(raw, args.allow, note=console.say)
    if args.json:
        print_json([row.to_json() for row in rows])
    else:
        print(table(rows))
    return 0


def shapes(model: str) -> Mapping[str, Any]:
    """The `config.json` of a known checkpoint, of the built-in model or of a folder; no weights.

    Raises:
        UsageError: none of these.
    """
    if model == POCKET:
        from lowvram.pocket import pocket_config

        return pocket_config()
    spec = find_spec(model)
    if spec is not None:
        return spec.raw
    path = Path(model) / "config.json"
    if not path.is_file():
        known = ", ".join([POCKET, *(spec.name for spec in SPECS.values())])
        raise UsageError(f"no shapes are known of {model}; wanted a folder or one of {known}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def table(rows: list[Row]) -> str:
    """The rows side by side, best runs in brackets."""
    lines = ["name               head    decode tok/s (best)   prefill tok/s  GB/token  of bound"]
    for row in rows:
        prefill = f"{row.prefill_tokens_s:.0f}" if row.prefill_tokens_s else "-"
        share = f"{row.of_bound:.0%}" if row.of_bound else "-"
        lines.append(
            f"{row.name:<18} {row.head or '-':<7} {row.decode_tokens_s:>11.2f} "
            f"({row.decode_tokens_s_best:.2f})".ljust(50)
            + f"{prefill:>12} {row.bytes_per_token / 1e9:>9.2f} {share:>9}"
        )
    return "\n".join(lines)
