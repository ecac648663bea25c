"""What a listener would hear for each list of piece sizes, worked out from step times.

    python benchmarks/listener.py --report reply.json
    python benchmarks/listener.py --codes-per-s 70 --tokens-per-s 20 --dit 0.12 --vocoder 0.01

The times are those of a request that spoke (`lowvram-demo run --report reply.json`), or given:
`--dit` and `--vocoder` are seconds for a second of speech that a pass covers. For each list and
each order of work it prints when sound begins after the first token, the longest silence of a
listener who plays at once, when to press play to hear no silence, when all is done, and from how
many codes a second on nobody waits. Nothing is loaded or run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowvram.engine.pieces import VocodeSettings
from lowvram.errors import LowVRAMError, UsageError
from lowvram.report import ORDERS, Order, StepTimes, best_blocks, enough_codes_per_s, listen
from lowvram.report.listener import FRAMES_PER_SECOND
from lowvram.settings import CODES_PER_SECOND

LISTS = (
    VocodeSettings().blocks,
    (1,),
    (2,),
    (4,),
    (8,),
    (1, 2, 4, 8),
    (2, 4, 8),
    (2, 2, 2, 4, 4, 8),
    (2, 1, 1, 2, 2, 4, 4, 8),
    (4, 8),
)
HEAD = "{:22} first sound      gap  smooth from     done  enough codes/s"

TOKENS_PER_SECOND = 4
"""Of text in a second of speech, where nobody says: English at an ordinary pace."""


def blocks_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    found.add_argument("--report", type=Path, help="JSON of a request that spoke")
    found.add_argument("--codes-per-s", type=float, help="steps of the Talker")
    found.add_argument("--tokens-per-s", type=float, help="steps of the Thinker")
    found.add_argument("--dit", type=float, help="seconds of the DiT for one of speech it covers")
    found.add_argument("--vocoder", type=float, help="seconds of the vocoder for one of speech")
    found.add_argument("--pass-s", type=float, help="seconds of any pass besides")
    found.add_argument("--seconds", type=float, default=20.0, help="of speech; default 20")
    found.add_argument("--tokens", type=int, help="of the reply; default four a second")
    found.add_argument("--blocks", type=blocks_of, nargs="+", default=LISTS, metavar="N,N,..")
    found.add_argument("--json", action="store_true", help="print JSON")
    return found


def step_times(options: argparse.Namespace) -> StepTimes:
    """Of the report, where there is one; what is given besides takes the place of its times."""
    times = StepTimes(talk_s=0.0, mel_s=0.0)
    if options.report:
        times = StepTimes.of_report(json.loads(options.report.read_text(encoding="utf-8")))
    elif options.codes_per_s is None or options.dit is None:
        raise UsageError("no step times; wanted --report FILE.json, or --codes-per-s and --dit")
    given = {
        "talk_s": options.codes_per_s and 1 / options.codes_per_s,
        "think_s": options.tokens_per_s and 1 / options.tokens_per_s,
        "mel_s": options.dit and options.dit / FRAMES_PER_SECOND,
        "wave_s": options.vocoder and options.vocoder / FRAMES_PER_SECOND,
        "pass_s": options.pass_s,
    }
    return replace(times, **{name: value for name, value in given.items() if value is not None})


def rows(
    times: StepTimes, lists: Sequence[tuple[int, ...]], codes: int, tokens: int
) -> list[dict[str, Any]]:
    """One for each order and list."""
    found = []
    for order in ORDERS:
        reply: dict[str, Any] = {"codes": codes, "tokens": tokens, "order": order}
        best = best_blocks(times, lists, **reply)
        for blocks in lists:
            settings = VocodeSettings(blocks=blocks)
            heard = listen(times, settings, **reply)
            found.append(
                {
                    "order": order,
                    "blocks": blocks,
                    "first_sound_s": heard.first_sound_s,
                    "longest_gap_s": heard.longest_gap_s,
                    "smooth_from_s": heard.smooth_from_s,
                    "total_s": heard.total_s,
                    "enough_codes_per_s": enough_codes_per_s(times, settings, **reply),
                    "best": blocks == best,
                }
            )
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = []
    order: Order | None = None
    for row in found:
        if row["order"] != order:
            order = row["order"]
            lines += ["", HEAD.format(order)]
        enough = row["enough_codes_per_s"]
        need = "never" if enough is None else f"{enough:.1f}" if enough else "any"
        name = ", ".join(map(str, row["blocks"])) + (" *" if row["best"] else "")
        lines.append(
            f"{name:22}{row['first_sound_s']:11.2f}s{row['longest_gap_s']:8.2f}s"
            f"{row['smooth_from_s']:12.2f}s{row['total_s']:8.2f}s{need:>16}"
        )
    return "\n".join([*lines, "", "* the best list of this order"])


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    try:
        times = step_times(options)
    except (LowVRAMError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    codes = max(1, round(options.seconds * CODES_PER_SECOND))
    tokens = options.tokens or round(options.seconds * TOKENS_PER_SECOND)
    found = rows(times, options.blocks, codes, tokens)
    print(json.dumps(found, indent=1) if options.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
