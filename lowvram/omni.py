"""`LowVRAMOmni`: one model on one device within one budget."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import torch

from lowvram.chat import Chat
from lowvram.checkpoint import Checkpoint, resolve
from lowvram.conversation import MediaSettings, PromptShape, measure, prepare
from lowvram.engine.context import Context
from lowvram.engine.graph import library_bytes
from lowvram.engine.run import Run
from lowvram.engine.scratch import metered_scratch
from lowvram.engine.voice import Voice
from lowvram.errors import DoesNotFitError, UsageError
from lowvram.events import SAMPLE_RATE, AudioChunk, Finished, Result, TextDelta
from lowvram.models.constants import Constants
from lowvram.models.token2wav import TIME_POINTS
from lowvram.offload import (
    Budget,
    Loader,
    Meter,
    Part,
    clear_frames,
    format_size,
    open_device,
    out_of_memory,
)
from lowvram.options import Conversation, Options, repeating, split_options, with_system
from lowvram.parts import Kernel, build_parts
from lowvram.planner import (
    DeviceFacts,
    Plan,
    check_options,
    decide_budget,
    make_plan,
    model_facts,
    options_of,
    resolve_dtype,
    vocoder_dtype,
)
from lowvram.report import Report, history_of, phase_rows
from lowvram.settings import GenerationSettings


class LowVRAMOmni:
    """A Qwen2.5-Omni model that answers in text and speech within a stated amount of memory.

    Make one with `from_pretrained`. Modules are loaded when a phase needs them; `close` (or leaving
    a `with` block) takes everything off the device. One request runs at a time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_memory: str | int | float | None,
        device: str,
        dtype: str,
        speech: bool,
        seed: int,
        allow: Sequence[str],
        kernel: Kernel,
    ) -> None:
        check_options(allow)
        self.checkpoint = checkpoint
        self._device = open_device(device)
        self._host = open_device("cpu")
        self._facts = DeviceFacts(
            name=self._device.name,
            type=self._device.type,
            total_bytes=self._device.total_bytes(),
            free_bytes=self._device.free_bytes(),
            context_bytes=self._device.context_bytes(),
            bfloat16=self._device.has_bfloat16(),
            library=library_bytes(self._device),
        )
        self._budget = decide_budget(max_memory, self._facts)
        # What the allocator keeps for later must leave room for kernels that are loaded late.
        self._device.set_limit(self._budget.budget_bytes - self._budget.guard_bytes // 2)
        self._dtype = resolve_dtype(
            dtype, checkpoint.stored_dtype, self._facts, packed=checkpoint.packed
        )
        self._kernel = kernel
        self._speech = speech and checkpoint.config.speaks
        checkpoint.verify(self._speech)
        self._seed = seed
        self._allow = tuple(allow)
        self._meter = Meter(self._device)
        self._scratch = metered_scratch(self._meter)
        self._tokenizer = checkpoint.tokenizer()
        self._used: tuple[str, ...] = ()
        self._loader = Loader(checkpoint.store, self._device, self._meter, self._parts())
        self._voices: dict[str, Voice] = {}
        self._constants = Constants()
        self._running = self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "pocket",
        max_memory: str | int | float | None = None,
        device: str = "auto",
        dtype: str = "auto",
        speech: bool = True,
        seed: int = 0,
        allow: Sequence[str] = (),
        *,
        offline: bool = False,
        kernel: Kernel = "auto",
    ) -> LowVRAMOmni:
        """Find and check a model. No weight is read before the first request.

        Args:
            model: a local folder, a hub id, or a built-in name (`pocket`: made here, speaks noise).
            max_memory: the budget, such as `"8GiB"` or bytes: what this process may hold on the
                device, driver context included. None is what the device has free now.
            device: `auto`, `cpu`, `cuda`, `cuda:1`, `npu`, `meta`.
            dtype: `auto` (as stored), `float32`, `bfloat16` or `float16`; the vocoder is float32.
            speech: False never reads the Talker and the vocoder.
            seed: re-seeds text, codes and noise at the start of every request.
            allow: names of options that may change results (`head8`, `talker8`, ...).
            offline: do not ask the hub, use what its cache holds.
            kernel: `reference` computes packed linears by de-quantizing, on every device.

        Raises:
            CheckpointError: a model that is missing, damaged, or of another kind.
            UsageError: an unknown device, type or option, or a size that is none.
            DeviceError: a device that cannot be used on this machine.
        """
        return cls(
            resolve(model, offline=offline),
            max_memory=max_memory,
            device=device,
            dtype=dtype,
            speech=speech,
            seed=seed,
            allow=allow,
            kernel=kernel,
        )

    @property
    def speakers(self) -> tuple[str, ...]:
        """The voices by name; empty where this model was loaded without speech."""
        return self.checkpoint.voices if self._speech else ()

    @property
    def resident(self) -> tuple[str, ...]:
        """The modules that are on the device now."""
        return self._loader.resident()

    def plan(self, conversation: Conversation, **options: Unpack[Options]) -> Plan:
        """What the request would need, from the headers of its media; nothing is loaded.

        Raises:
            UsageError, MediaError: a conversation or medium that is wrong.
        """
        settings, media = self._settings(options)
        messages = with_system(conversation, options.get("system"))
        shape = measure(messages, **self._prompting(settings, media))
        return self._plan(shape, settings)

    def generate(self, conversation: Conversation, **options: Unpack[Options]) -> Result:
        """The whole reply at once; see `stream` for the errors."""
        for event in self.stream(conversation, **options):
            if isinstance(event, Finished):
                return event.result
        raise AssertionError("a stream that is not closed ends with Finished")

    def stream(
        self, conversation: Conversation, **options: Unpack[Options]
    ) -> Generator[TextDelta | AudioChunk | Finished, None, None]:
        """The reply as it comes: `TextDelta`s, `AudioChunk`s, and last `Finished`.

        Arguments are checked, and the plan is made, when the first event is asked for. Closing the
        iterator stops the work and takes what it had loaded off the device.

        Raises:
            UsageError, MediaError: a conversation, medium or option that is wrong.
            CheckpointError: a file that turns out damaged when it is read.
            DoesNotFitError: no plan fits the budget; nothing was loaded.
        """
        if self._closed:
            raise UsageError("this model is closed; open it again with from_pretrained")
        if self._running:
            raise UsageError("a request is running; finish or close its stream first")
        started = time.perf_counter()
        settings, media = self._settings(options)
        messages = with_system(conversation, options.get("system"))
        prompt = prepare(messages, **self._prompting(settings, media))
        plan = self._plan(prompt.shape, settings)
        if not plan.fits and self._device.type == "cpu" and self._constants.nbytes:
            self._forget_constants()
            plan = self._plan(prompt.shape, settings)
        if not plan.fits:
            raise DoesNotFitError(plan.refusal, plan)
        run = Run(
            context=Context(
                device=self._device,
                store=self.checkpoint.store,
                loader=self._loader,
                meter=self._meter,
                plan=plan,
                dtype=getattr(torch, plan.dtype),
                scratch=self._scratch,
                constants=self._constants,
            ),
            checkpoint=self.checkpoint,
            tokenizer=self._tokenizer,
            prompt=prompt,
            settings=settings,
            voice=self._voice(settings.speaker) if settings.speech else None,
            started=started,
        )
        self._use(plan.used)
        before = frozenset(self._loader.resident())
        moved = self._loader.bytes_host_to_device
        self._meter.restart()
        self._running = True
        try:
            for part in before:
                if not plan.resident(part):
                    self._loader.drop(part)
            yield from run.events()
        except BaseException as error:
            # Whoever keeps the error would keep what was allocated when it was raised.
            clear_frames(error)
            for part in frozenset(self._loader.resident()) - before:
                self._loader.drop(part)
            self._device.empty_cache()
            if out_of_memory(error):
                raise DoesNotFitError(_surprise(plan, error), plan) from error
            raise
        finally:
            self._running = False
        report = self._report(run, plan, self._loader.bytes_host_to_device - moved)
        text = "".join(run.text)
        yield Finished(Result(text, run.audio, report, tuple(run.tokens), tuple(run.codes)))

    def speak(
        self, text: str, **options: Unpack[Options]
    ) -> Generator[TextDelta | AudioChunk | Finished, None, None]:
        """A given text as speech: `stream` of a conversation whose reply it is.

        Raises:
            As `stream`; UsageError also for an empty text, and without a voice.
        """
        options["say"] = text
        return self.stream(repeating(text), **options)

    def chat(self, **options: Unpack[Options]) -> Chat:
        """A conversation that remembers its turns."""
        return Chat(self, options)

    def close(self) -> None:
        """Take everything off the device and close the checkpoint's files."""
        self._closed = True
        self._loader.close()
        self._forget_constants()
        self.checkpoint.store.close()

    def _forget_constants(self) -> None:
        """On the CPU they count, in every phase."""
        self._constants.clear()
        self._meter.release("carry", "constants")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _settings(self, options: Options) -> tuple[GenerationSettings, MediaSettings]:
        """The request's settings; the voice is checked here, before anything is read."""
        settings, media = split_options(options, seed=self._seed, speech=self._speech)
        if (text := options.get("say")) is not None:
            settings = settings.saying(self._words(text))
        settings = settings.completed(self.checkpoint.generation)
        if settings.speech:
            settings = replace(settings, speaker=self.checkpoint.check_speaker(settings.speaker))
        return settings, media

    def _words(self, text: str) -> list[int]:
        tokens = self._tokenizer.encode(text.strip())
        if not tokens:
            raise UsageError("the text to say is empty; wanted a word or more")
        return tokens

    def _prompting(self, settings: GenerationSettings, media: MediaSettings) -> dict[str, Any]:
        return {
            "tokenizer": self._tokenizer,
            "config": self.checkpoint.config.thinker,
            "settings": media,
            "speech": settings.speech,
            "preprocessor": self.checkpoint.preprocessor,
        }

    def _plan(self, shape: PromptShape, settings: GenerationSettings) -> Plan:
        return make_plan(
            model_facts(self.checkpoint, speech=self._speech),
            shape,
            settings,
            facts=self._facts,
            budget=self._budget_now(),
            dtype=self._dtype,
            allow=self._allow,
            on_device=frozenset(self._loader.resident()),
            made_with=self._used,
            kernel=self._kernel,
            kept_bytes=self._constants.nbytes,
            modulated=self._constants.has_modulation(settings.solver, TIME_POINTS),
        )

    def _budget_now(self) -> Budget:
        """The budget, or what the device still has where others have taken more than the guard."""
        if self._device.type in ("cpu", "meta"):
            return self._budget
        free = self._device.free_bytes()
        if free >= self._budget.budget_bytes - self._budget.guard_bytes:
            return self._budget
        return decide_budget(self._budget.budget_bytes, replace(self._facts, free_bytes=free))

    def _parts(self) -> list[Part]:
        """The modules as they are built with the options in effect."""
        return build_parts(
            self.checkpoint,
            getattr(torch, self._dtype.name),
            speech=self._speech,
            kernel=self._kernel,
            scratch=self._scratch,
            used=self._used,
            dit_dtype=getattr(torch, vocoder_dtype(self._facts.type, self._facts.bfloat16)),
        )

    def _use(self, options: tuple[str, ...]) -> None:
        """Have modules built anew where other options are in effect for them than before."""
        before, self._used = self._used, options
        for part in self._parts():
            if options_of(part.name, before) != options_of(part.name, options):
                self._loader.put(part)

    def _voice(self, name: str | None) -> Voice:
        if not self._voices:
            self._voices = self.checkpoint.load_voices()
        return self._voices[name or self.checkpoint.voices[0]]

    def _report(self, run: Run, plan: Plan, moved: int) -> Report:
        measured = {p.name: (p.seconds, p.peak_bytes) for p in self._meter.phases}
        phases = phase_rows(plan, measured)
        audio = run.audio
        return Report(
            phases=phases,
            budget_bytes=plan.budget_bytes,
            predicted_peak_bytes=plan.predicted_peak_bytes,
            measured_peak_bytes=max(p.measured_peak_bytes for p in phases),
            first_text_s=run.first_text_s,
            first_audio_s=run.first_audio_s,
            total_s=run.total_s,
            bytes_host_to_device=moved,
            host_peak_bytes=self._host.peak_bytes(),
            prompt_tokens=len(run.prompt.ids),
            reply_tokens=len(run.tokens),
            codes=len(run.codes),
            speech_cut_off=len(run.codes) == run.settings.codes,
            audio_seconds=0.0 if audio is None else len(audio) / SAMPLE_RATE,
            seed=run.settings.seed,
            option_errors=dict(run.context.option_errors),
            phase_seconds=dict(run.context.phase_seconds),
            longest_gap_s=run.longest_gap_s,
            model=plan.model,
            device=plan.device,
            notes=(*self._loader.notes, *run.context.notes),
            history=history_of(self._meter.timeline),
        )


def _surprise(plan: Plan, error: BaseException) -> str:
    return (
        f"{plan.device} ran out of memory within a plan of "
        f"{format_size(plan.predicted_peak_bytes)}: something else uses the device; free it, or "
        f"set a smaller budget ({str(error).splitlines()[0]})"
    )
