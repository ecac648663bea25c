"""`bench memory`: what a video of some length takes, by the meter, at a model's true shapes.

Nothing is computed and no weight is there: stock transformers and our engine run on `meta`, where
tensors have shapes and a ledger counts them. On top of ours comes what a driver takes for a process
(`ASSUMED_CONTEXT_BYTES`); the published figures, which stock stands against, have none in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch

from lowvram.bench.memory_replay import Replay
from lowvram.bench.memory_request import (
    ShapeCheckpoint,
    blank_voice,
    no_words,
    reply_tokens,
    video_prompt,
)
from lowvram.bench.stock import StockThinker, card_bytes
from lowvram.config import OmniConfig
from lowvram.conversation import Prompt
from lowvram.engine.context import Context
from lowvram.engine.run import Run
from lowvram.engine.scratch import metered_scratch
from lowvram.models.dit import DiT
from lowvram.offload import Loader, Meter, PhaseMeasure, open_device
from lowvram.parts import build_parts
from lowvram.planner import ModelFacts, Plan, config_facts, plan_mode
from lowvram.planner.device import ASSUMED_CONTEXT_BYTES
from lowvram.planner.modes import Mode as EngineMode
from lowvram.settings import GenerationSettings

Mode = Literal["stock"] | EngineMode
MODES: tuple[Mode, ...] = ("stock", *get_args(EngineMode))
"""The official demo on stock transformers; every layer of the Thinker stays; its keys and values
wait on the host besides; the smallest budget that still answers, in speech."""

SECONDS = (15, 30, 60)
"""Lengths of video that figures are published for."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One mode over one length of video. Peaks are in bytes.

    `reference_bytes` is the published peak of the official demo, None where there is none;
    `budget_bytes` the smallest budget (the guard included) for that mode of ours; `phase` is that
    of the measured peak, and `parts` who holds what then.
    """

    video_seconds: int
    prompt_tokens: int
    mode: Mode
    measured_peak_bytes: int
    predicted_peak_bytes: int
    reference_bytes: int | None
    budget_bytes: int | None = None
    phase: str
    parts: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench_memory(
    name: str,
    raw: Mapping[str, Any],
    seconds: Sequence[int],
    *,
    modes: Sequence[Mode] = MODES,
    note: Callable[[str], None] = lambda text: None,
) -> list[Case]:
    """Every mode for every length.

    Args:
        name: of the model, as published figures know it.
        raw: its `config.json`; weights are packed if that speaks of a packing.
        seconds: of video with sound.
        modes: those wanted.
        note: hears what is being done.
    """
    config = OmniConfig.from_dict(dict(raw))
    stock = StockThinker(raw)
    cases = []
    for length in seconds:
        for mode in modes:
            note(f"{length} s of video: {mode}")
            reference = card_bytes(name, length)
            if mode == "stock":
                cases.append(_stock_case(stock, config, length, reference))
            else:
                cases.append(_our_case(name, config, length, mode, reference))
    return cases


def _stock_case(
    stock: StockThinker, config: OmniConfig, seconds: int, reference: int | None
) -> Case:
    tokens = len(video_prompt(config.thinker, seconds).ids)
    peak = stock.peak(tokens)
    return Case(
        video_seconds=seconds,
        prompt_tokens=tokens,
        mode="stock",
        measured_peak_bytes=peak.measured_peak_bytes,
        predicted_peak_bytes=peak.predicted_peak_bytes,
        reference_bytes=reference,
        phase="prefill",
        parts={"weights": peak.weights, **peak.predicted},
    )


def _our_case(
    name: str, config: OmniConfig, seconds: int, mode: EngineMode, reference: int | None
) -> Case:
    model = config_facts(name, config)
    prompt = video_prompt(config.thinker, seconds)
    settings = GenerationSettings(speech=config.speaks).completed(model.generation)
    plan = plan_mode(model, prompt.shape, settings, mode=mode)
    phases = run_plan(model, prompt, settings, plan)
    peak = max(phases, key=lambda phase: phase.peak_bytes)
    return Case(
        video_seconds=seconds,
        prompt_tokens=len(prompt.ids),
        mode=mode,
        measured_peak_bytes=ASSUMED_CONTEXT_BYTES + peak.peak_bytes,
        predicted_peak_bytes=plan.predicted_peak_bytes,
        reference_bytes=reference,
        budget_bytes=plan.budget_bytes,
        phase=peak.name,
        parts={"context": ASSUMED_CONTEXT_BYTES, **peak.peak_by_owner},
    )


def run_plan(
    model: ModelFacts, prompt: Prompt, settings: GenerationSettings, plan: Plan
) -> list[PhaseMeasure]:
    """The phases of a request, run on `meta` as `plan` says; no context is in their peaks.

    Of the reply come a few tokens and two pieces of speech: what a longer one takes is there from
    the start.
    """
    device = open_device("meta")
    meter = Meter(device)
    scratch = metered_scratch(meter)
    checkpoint = ShapeCheckpoint(model.name, model.config, reply_tokens(plan))
    dtype = getattr(torch, plan.dtype)
    speech = settings.speech
    replay = Replay(meter, (DiT,), scratch)
    parts = [
        replace(part, build=replay.building(part.build))
        for part in build_parts(checkpoint, dtype, speech=speech, kernel="auto", scratch=scratch)
    ]
    loader = Loader(None, device, meter, parts)
    run = Run(
        context=Context(
            device=device,
            store=checkpoint.store,
            loader=loader,
            meter=meter,
            plan=plan,
            dtype=dtype,
            scratch=scratch,
        ),
        checkpoint=checkpoint,
        tokenizer=no_words(),
        prompt=prompt,
        settings=settings,
        voice=blank_voice(model.config, model.voice_frames) if speech else None,
        started=0.0,
    )
    for _ in run.events():
        pass
    loader.close()
    return meter.phases
