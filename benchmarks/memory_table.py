"""Puts the cases of `bench memory` into the README, between its two marks.

lowvram-demo bench memory -m Qwen2.5-Omni-7B-AWQ --json > CASES.json
python benchmarks/memory_table.py CASES.json README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lowvram.bench.memory_table import markdown_table

BEGIN, END = "<!-- bench memory -->\n", "<!-- /bench memory -->\n"


def main(cases: str, readme: str) -> None:
    target = Path(readme)
    text = target.read_text(encoding="utf-8")
    before, mark, rest = text.partition(BEGIN)
    _, close, after = rest.partition(END)
    if not (mark and close):
        sys.exit(f"{readme} has no {BEGIN.strip()} ... {END.strip()}")
    table = markdown_table(json.loads(Path(cases).read_text(encoding="utf-8")))
    target.write_text(f"{before}{BEGIN}{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
