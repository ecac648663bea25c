"""`quantize-checkpoint`: a 16-bit checkpoint in, one with 4-bit text layers out.

Exit codes are those of `lowvram-demo`.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from lowvram.cli.arguments import Parser, version
from lowvram.cli.main import run_program
from lowvram.cli.output import Console, print_json
from lowvram.cli.values import device_of, seed_of, size_of

if TYPE_CHECKING:
    from lowvram.quantize import Progress, QuantizeSettings

PROGRAM = "quantize-checkpoint"


def main(argv: list[str] | None = None) -> int:
    """Run one command line, that of the process by default, and return its exit code."""
    return run_program(PROGRAM, argv, lambda line: build_parser().parse_args(line), _run)


def build_parser() -> Parser:
    """The flags; their defaults are those of `QuantizeSettings`."""
    from lowvram.quantize import BUILTIN, METHODS, QuantizeSettings

    usual = QuantizeSettings()
    parser = Parser(
        prog=PROGRAM,
        description="Put the text layers of a Qwen2.5-Omni checkpoint into four bits (AWQ format), "
        "one layer in memory at a time.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    parser.add_argument("source", metavar="SRC", help="a folder, a hub id or a built-in name")
    parser.add_argument("destination", metavar="DST", help="the folder to make")
    how = parser.add_argument_group("how")
    how.add_argument("--bits", type=int, default=usual.bits, help="bits of a weight: 4")
    how.add_argument(
        "--group-size",
        type=int,
        default=usual.group_size,
        metavar="N",
        help="weights that share a step: 32, 64 or 128 (default: %(default)s)",
    )
    how.add_argument(
        "--method",
        choices=METHODS,
        default=usual.method,
        help="awq: search scales and ranges; awq+gptq: then round so that errors make up for each "
        "other, nearer to SRC in about three times as long; rtn: round to the nearest "
        "(default: %(default)s)",
    )
    how.add_argument(
        "--calibration",
        default=usual.calibration,
        metavar="SET",
        help="a folder of media and texts, a .jsonl file of conversations, builtin or none "
        f"(default: {BUILTIN})",
    )
    how.add_argument(
        "--samples",
        type=int,
        default=usual.samples,
        metavar="N",
        help="the most conversations to calibrate with (default: %(default)s)",
    )
    how.add_argument(
        "--seq-len",
        type=int,
        default=usual.seq_len,
        metavar="N",
        help="the most tokens of each (default: %(default)s)",
    )
    how.add_argument(
        "--seed",
        type=seed_of,
        default=usual.seed,
        metavar="N",
        help="the same seed gives the same files (default: %(default)s)",
    )
    _add_work(parser, usual)
    return parser


def _add_work(parser: Parser, usual: QuantizeSettings) -> None:
    group = parser.add_argument_group("the work")
    group.add_argument(
        "--max-memory",
        type=size_of,
        metavar="SIZE",
        help="the most host memory to use, as in 4GiB (default: half of what is free)",
    )
    group.add_argument(
        "--device",
        type=device_of,
        default=usual.device,
        help="where layers are run: auto, cpu, cuda[:N] or npu[:N] (default: %(default)s)",
    )
    group.add_argument("--offline", action="store_true", help="take hub models from the cache only")
    group.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    group.add_argument("--overwrite", action="store_true", help="replace DST, or begin anew")
    group.add_argument(
        "--dry-run", action="store_true", help="say what would be done; nothing is written"
    )
    group.add_argument(
        "--verify", action="store_true", help="compare the result with SRC on held-out inputs"
    )
    group.add_argument("--json", action="store_true", help="one JSON object on stdout")
    group.add_argument("-q", "--quiet", action="store_true", help="no notes, no progress")
    group.add_argument("-v", "--verbose", action="count", default=0, help="every linear's errors")


def _run(args: Namespace, console: Console) -> int:
    from lowvram.quantize import QuantizeSettings, prepare_job

    settings = QuantizeSettings(
        bits=args.bits,
        group_size=args.group_size,
        method=args.method,
        calibration=args.calibration,
        samples=args.samples,
        seq_len=args.seq_len,
        max_memory=args.max_memory,
        device=args.device,
        seed=args.seed,
    )
    if args.dry_run:
        job = prepare_job(args.source, args.destination, settings, offline=args.offline)
        job.source.checkpoint.store.close()
        if args.json:
            print_json(job.plan.to_json())
        else:
            print(job.plan)
        return 0
    return _quantize(args, settings, console)


def _quantize(args: Namespace, settings: QuantizeSettings, console: Console) -> int:
    from lowvram.quantize import quantize_checkpoint

    bar = _Bar(console)
    try:
        report = quantize_checkpoint(
            args.source,
            args.destination,
            settings,
            resume=args.resume,
            overwrite=args.overwrite,
            verify=args.verify,
            offline=args.offline,
            on_progress=bar.show,
            note=lambda text: bar.say(f"note: {text}"),
        )
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt("what is finished is kept; go on with --resume") from stopped
    finally:
        bar.close()
    if args.json:
        print_json(report.to_json())
    else:
        print(f"{report.details()}\n\n{report}" if args.verbose else report)
    console.say(f"{report.destination}: {report.seconds:.0f} s")
    return 0


class _Bar:
    """Finished layers, the error of the last one and the time left; on a terminal only."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Any = None

    def show(self, at: Progress) -> None:
        if self._console.quiet or not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm

            layout = "{desc} |{bar}| {n_fmt}/{total_fmt} layers{postfix} {elapsed}"
            self._bar = tqdm(total=at.layers, file=sys.stderr, leave=False, bar_format=layout)
        self._bar.set_description_str(at.stage, refresh=False)
        if at.stage == "layer":
            self._bar.set_postfix_str(_told(at), refresh=False)
        self._bar.update(at.layer - self._bar.n)
        self._bar.refresh()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is None:
            self._console.say(text)
        elif not self._console.quiet:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _told(at: Progress) -> str:
    error = ""
    if at.error_before is not None and at.error_after is not None:
        error = f"error {at.error_after:.3g} (rounded {at.error_before:.3g}), "
    minutes, seconds = divmod(round(at.seconds_left or 0), 60)
    return f"{error}{minutes}:{seconds:02d} left"


if __name__ == "__main__":
    sys.exit(main())
