"""A stand-in for the engine, so that what the commands do with its events is tested alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lowvram.cli.request import Request
from lowvram.errors import DoesNotFitError, UsageError
from lowvram.events import AudioChunk, Finished, Result, TextDelta
from lowvram.planner.plan import PhasePlan, Plan
from lowvram.report import PhaseReport, Report

TONE = np.linspace(-1, 1, 2400, dtype=np.float32)
"""0.1 s of sound."""


def make_plan(*, fits: bool = True) -> Plan:
    row = PhasePlan(
        name="decode",
        predicted_peak_bytes=2**30,
        parts={},
        modules=("text",),
        on_device=("text",),
        reason="stays",
    )
    return Plan(
        fits=fits,
        model="pocket",
        device="cpu",
        dtype="float32",
        budget_bytes=2**31,
        context_bytes=0,
        guard_bytes=2**26,
        predicted_peak_bytes=2**30,
        minimum_budget_bytes=2**30 + 2**26,
        phases=(row,),
        residency={"text": "resident"},
        bytes_to_move=0,
        reasons=(),
    )


def make_report(audio_seconds: float, *, cut_off: bool = False) -> Report:
    row = PhaseReport(
        name="decode", seconds=0.5, predicted_peak_bytes=2**30, measured_peak_bytes=2**29
    )
    return Report(
        phases=(row,),
        budget_bytes=2**31,
        predicted_peak_bytes=2**30,
        measured_peak_bytes=2**29,
        first_text_s=0.25,
        first_audio_s=0.5 if audio_seconds else None,
        total_s=1.5,
        bytes_host_to_device=12,
        host_peak_bytes=2**28,
        prompt_tokens=5,
        reply_tokens=2,
        codes=10,
        audio_seconds=audio_seconds,
        speech_cut_off=cut_off,
        seed=0,
    )


@dataclass
class Engine:
    """What the stand-in will do, and what it was asked.

    `script` holds words (str), sounds (arrays), exceptions and calls, in the order of the reply.
    """

    script: list[Any] = field(default_factory=lambda: ["Hello", " there", TONE, TONE])
    speaks: bool = True
    voices: tuple[str, ...] = ("Chelsie", "Ethan")
    opened: list[Request] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    closed: int = 0
    cut_off: bool = False
    refusal: Exception | None = None

    def refuse(self) -> None:
        self.refusal = DoesNotFitError("does not fit in 2 GiB", make_plan(fits=False))

    def checkpoint(self) -> Any:
        return SimpleNamespace(
            name="pocket",
            voices=self.voices,
            config=SimpleNamespace(speaks=self.speaks),
            check_speaker=self._check_speaker,
            verify=lambda speech: None,
        )

    def _check_speaker(self, name: str | None) -> str:
        if name not in (None, *self.voices):
            raise UsageError(f"unknown voice {name!r}; known: {', '.join(self.voices)}")
        return name or self.voices[0]

    def reply(self, messages: list[Any], options: dict[str, Any]) -> Iterator[Any]:
        self.asked.append({"messages": messages, **options})
        if self.refusal is not None:
            raise self.refusal
        text, audio = "", [np.zeros(0, np.float32)]
        for step in self.script:
            if isinstance(step, BaseException):
                raise step
            if callable(step):
                step()
                continue
            if isinstance(step, str):
                text += step
                yield TextDelta(step)
            elif self.opened[-1].speech:
                audio.append(step)
                yield AudioChunk(step, 24_000, 0.0, ())
        sound = np.concatenate(audio)
        report = make_report(len(sound) / 24_000, cut_off=self.cut_off)
        yield Finished(Result(text, sound if self.opened[-1].speech else None, report))


class StandIn:
    """The methods of `LowVRAMOmni` that the commands use."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.checkpoint = engine.checkpoint()
        self.speakers = engine.voices
        self.messages: list[Any] = []

    def plan(self, messages: list[Any], **options: Any) -> Plan:
        return make_plan(fits=True)

    def stream(self, messages: Any, **options: Any) -> Iterator[Any]:
        return self._engine.reply(messages, options)

    def chat(self) -> Any:
        def stream(content: list[Any], **options: Any) -> Iterator[Any]:
            for event in self._engine.reply(content, options):
                if isinstance(event, Finished):
                    self.messages.append({"role": "user", "content": content})
                    self.messages.append({"role": "assistant", "content": event.result.text})
                yield event

        return SimpleNamespace(stream=stream, messages=self.messages)

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.closed += 1


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Engine:
    """An engine whose every reply follows `engine.script`; the command runs in an empty folder."""
    engine = Engine()

    def open_model(request: Request) -> StandIn:
        engine.opened.append(request)
        return StandIn(engine)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Request, "open_model", open_model)
    monkeypatch.setattr(Request, "find_checkpoint", lambda request: engine.checkpoint())
    return engine
