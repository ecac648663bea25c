"""`lowvram-demo bench`: how fast this machine decodes, and what memory a video takes anywhere, at a
model's true shapes."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lowvram.checkpoint import read_config
from lowvram.cli.output import Console, print_json
from lowvram.errors import UsageError
from lowvram.planner import check_options
from lowvram.specs import POCKET, SPECS, find_spec

if TYPE_CHECKING:
    from lowvram.bench.decode import Row


class _Item(Protocol):
    def to_json(self) -> dict[str, Any]: ...


class _Found(NamedTuple):
    """What was measured, and how it reads."""

    items: Sequence[_Item]
    text: str


def main(args: Namespace, console: Console) -> int:
    found = _memory(args, console) if args.what == "memory" else _decode(args, console)
    if args.json:
        print_json([one.to_json() for one in found.items])
    else:
        print(found.text)
    return 0


def _decode(args: Namespace, console: Console) -> _Found:
    if args.device not in ("auto", "cpu"):
        raise UsageError(f"bench decode measures the CPU, not {args.device}; use --device cpu")
    check_options(args.allow)
    raw = shapes(args.model)
    import torch

    from lowvram.bench.decode import bench_decode

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows = bench_decode(raw, args.allow, note=console.say)
    return _Found(rows, table(rows))


def _memory(args: Namespace, console: Console) -> _Found:
    if args.device not in ("auto", "meta"):
        raise UsageError(f"bench memory counts shapes, on no device; leave --device {args.device}")
    raw = shapes(args.model)
    from lowvram.bench.memory import bench_memory
    from lowvram.bench.memory_table import memory_table

    spec = find_spec(args.model)
    cases = bench_memory(
        spec.name if spec else args.model, raw, args.video_seconds, note=console.say
    )
    return _Found(cases, memory_table([case.to_json() for case in cases]))


def shapes(model: str) -> Mapping[str, Any]:
    """The `config.json` of a known checkpoint, of the built-in model or of a folder; no weights.

    Raises:
        UsageError: none of these.
        CheckpointError: a folder's `config.json` cannot be read, or is of another model.
    """
    if model == POCKET:
        from lowvram.pocket import pocket_config

        return pocket_config()
    spec = find_spec(model)
    if spec is not None:
        return spec.raw
    path = Path(model).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        known = ", ".join([POCKET, *(spec.name for spec in SPECS.values())])
        raise UsageError(
            f"no shapes are known of {model}; wanted a folder, a config.json, or one of {known}"
        )
    return read_config(file)[0]


def table(rows: list[Row]) -> str:
    """The rows side by side, best runs in brackets."""
    lines = [
        f"{'name':<18} {'head':<7} {'decode tok/s (best)':>22} {'prefill tok/s of 128, 512':>26}"
        f" {'GB/token':>9} {'of bound':>9}"
    ]
    for row in rows:
        decode = f"{row.decode_tokens_s:.2f} ({row.decode_tokens_s_best:.2f})"
        prefills = row.prefill_128_tokens_s, row.prefill_tokens_s
        prefill = ", ".join(f"{speed:.0f}" if speed else "-" for speed in prefills)
        share = f"{row.of_bound:.0%}" if row.of_bound else "-"
        lines.append(
            f"{row.name:<18} {row.head or '-':<7} {decode:>22} {prefill:>26}"
            f" {row.bytes_per_token / 1e9:>9.2f} {share:>9}"
        )
    return "\n".join(lines)
