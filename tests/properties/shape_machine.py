"""An engine of shapes: requests run on `meta` one after another, as `LowVRAMOmni` runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lowvram.bench.memory_replay import Replay
from lowvram.bench.memory_request import ShapeCheckpoint, blank_voice, no_words, reply_tokens
from lowvram.conversation import Prompt
from lowvram.engine.context import Context
from lowvram.engine.run import Run
from lowvram.engine.scratch import metered_scratch
from lowvram.models.dit import DiT
from lowvram.offload import Budget, Loader, Meter, PhaseMeasure, guard_bytes, open_device
from lowvram.parts import build_parts
from lowvram.planner import DeviceFacts, ModelFacts, Plan, make_plan, resolve_dtype
from lowvram.settings import GenerationSettings

META = DeviceFacts(name="meta", type="meta", total_bytes=None, free_bytes=None, context_bytes=0)
"""Without a context, so that nothing hides a difference between what is held and predicted."""

HOST_FREE = 64 << 30


class Machine:
    """One model on `meta`; what a plan lets stay stays for the next request."""

    def __init__(self, model: ModelFacts, *, replays: bool = True) -> None:
        """Where it `replays`, layers that do the same again only take the memory that they took."""
        self.model = model
        self._dtype = resolve_dtype("auto", model.stored_dtype, META, packed=bool(model.packed))
        self._device = open_device("meta")
        self._meter = Meter(self._device)
        self._scratch = metered_scratch(self._meter)
        self._replay = Replay(self._meter, (DiT,), self._scratch)
        parts = build_parts(
            ShapeCheckpoint(model.name, model.config),
            getattr(torch, self._dtype.name),
            speech=model.config.speaks,
            kernel="auto",
            scratch=self._scratch,
        )
        if replays:
            parts = [replace(part, build=self._replay.building(part.build)) for part in parts]
        self._loader = Loader(None, self._device, self._meter, parts)

    @property
    def resident(self) -> Sequence[str]:
        return self._loader.resident()

    @property
    def held(self) -> int:
        """Bytes held now."""
        return sum(self._meter.held().values())

    def plan(self, prompt: Prompt, settings: GenerationSettings, budget: int) -> Plan:
        return make_plan(
            self.model,
            prompt.shape,
            settings,
            facts=META,
            budget=Budget(budget_bytes=budget, context_bytes=0, guard_bytes=guard_bytes(budget)),
            dtype=self._dtype,
            on_device=frozenset(self.resident),
            host_free=HOST_FREE,
        )

    def run(self, prompt: Prompt, settings: GenerationSettings, plan: Plan) -> list[PhaseMeasure]:
        """The phases of a request that runs as `plan` says."""
        settings = settings.completed(self.model.generation)
        self._meter.restart()
        self._replay.restart()
        for part in self.resident:
            if not plan.resident(part):
                self._loader.drop(part)
        checkpoint = ShapeCheckpoint(self.model.name, self.model.config, reply_tokens(plan))
        run = Run(
            context=Context(
                device=self._device,
                store=checkpoint.store,
                loader=self._loader,
                meter=self._meter,
                plan=plan,
                dtype=getattr(torch, plan.dtype),
                scratch=self._scratch,
            ),
            checkpoint=checkpoint,
            tokenizer=no_words(),
            prompt=prompt,
            settings=settings,
            voice=blank_voice(self.model.config, self.model.voice_frames)
            if settings.speech
            else None,
            started=0.0,
        )
        for _ in run.events():
            pass
        assert not run.context.notes
        return self._meter.phases
