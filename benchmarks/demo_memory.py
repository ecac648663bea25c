"""Puts the memory that the demos need into their README, from the planner: nothing is loaded.

python benchmarks/demo_memory.py demos/README.md

Every demo runs as it stands, without arguments, on a stand-in that plans each request it is asked
in place of answering it: on a cuda device that is not there, from the headers of the media in
`demos/media`. A demo needs what the largest of its requests needs.
"""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from unittest import mock

import numpy as np

from lowvram.conversation import measure_without_tokenizer
from lowvram.events import Finished, Result
from lowvram.options import split_options, with_system
from lowvram.planner import Plan, config_facts, plan_request
from lowvram.specs import find_spec

DEMOS = Path(__file__).resolve().parents[1] / "demos"
MODELS = ("Qwen2.5-Omni-3B", "Qwen2.5-Omni-3B-AWQ", "Qwen2.5-Omni-7B", "Qwen2.5-Omni-7B-AWQ")
ELSEWHERE = "cuda:63"
"""A device that is not here, so that the table is the same on every machine."""
BEGIN, END = "<!-- demo memory -->\n", "<!-- /demo memory -->\n"


class Planning:
    """The methods of `LowVRAMOmni` that demos use; `plans` collects every request's."""

    def __init__(self, model: str, speech: bool, plans: list[Plan]) -> None:
        spec = find_spec(model)
        assert spec is not None, model
        self._model = config_facts(spec.name, spec.config)
        self._speech = speech
        self._plans = plans

    def generate(self, conversation: Any, **options: Any) -> Result:
        settings, media = split_options(options, seed=0, speech=self._speech)
        shape = measure_without_tokenizer(
            with_system(conversation, options.get("system")),
            config=self._model.config.thinker,
            settings=media,
            speech=settings.speech,
        )
        self._plans.append(plan_request(self._model, shape, settings, device=ELSEWHERE))
        report: Any = SimpleNamespace(audio_seconds=0.0)
        return Result("", np.zeros(0, np.float32), report)

    def stream(self, conversation: Any, **options: Any) -> Iterator[Finished]:
        yield Finished(self.generate(conversation, **options))

    def chat(self, **options: Any) -> SimpleNamespace:
        turns: list[Any] = []

        def send(content: Any) -> Result:
            turns.append({"role": "user", "content": content})
            result = self.generate(turns, **options)
            turns.append({"role": "assistant", "content": result.text})
            return result

        return SimpleNamespace(send=send)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to close."""


def needs(demo: Path, model: str) -> tuple[int, int]:
    """Budgets for a demo: that with which every module stays on the device, and the least."""
    plans: list[Plan] = []

    def from_pretrained(_: str, max_memory: str | None = None, speech: bool = True) -> Planning:
        return Planning(model, speech, plans)

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        mock.patch.object(sys, "argv", [demo.name]),
        mock.patch("lowvram.LowVRAMOmni", SimpleNamespace(from_pretrained=from_pretrained)),
    ):
        runpy.run_path(str(demo), run_name="__main__")
    stay = max(plan.budget_bytes for plan in plans)
    return stay, max(plan.minimum_budget_bytes for plan in plans)


def table() -> str:
    """Markdown: a row for each demo, GiB on the device for each model."""
    head = [f"| demo | {' | '.join(MODELS)} |", "| --- |" + " --- |" * len(MODELS)]
    rows = []
    for demo in sorted(DEMOS.glob("*.py")):
        found = (needs(demo, model) for model in MODELS)
        cells = (f"{stay / 2**30:.2f} / {least / 2**30:.2f}" for stay, least in found)
        rows.append(f"| [{demo.stem}]({demo.name}) | {' | '.join(cells)} |")
    return "\n".join([*head, *rows]) + "\n"


def main(readme: str) -> None:
    target = Path(readme)
    before, mark, rest = target.read_text(encoding="utf-8").partition(BEGIN)
    _, close, after = rest.partition(END)
    if not (mark and close):
        sys.exit(f"{readme} has no {BEGIN.strip()} ... {END.strip()}")
    target.write_text(f"{before}{BEGIN}{table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
