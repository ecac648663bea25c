"""What `accelerator.py` runs in a process of its own: requests within a budget, and plain copies.

Nothing here decodes media: prompts are made of shapes, 781 tokens for every second of video.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from random_checkpoint import RandomCheckpoint

import lowvram.omni
from lowvram import AudioChunk, DoesNotFitError, Finished, LowVRAMOmni, TextDelta
from lowvram.bench.memory_request import video_prompt
from lowvram.config import ThinkerConfig
from lowvram.conversation import Prompt, VisionInput
from lowvram.offload import CopyLane, Device, Loader, Meter, Placement, open_device
from lowvram.parts import build_parts
from lowvram.report import Report

WORDS = [{"role": "user", "content": "What happens in this video?"}]
"""Stands in the place of the prompt, which is made of shapes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request: seconds of video, tokens of text and seconds of speech in the reply."""

    video_seconds: int
    max_tokens: int
    max_speech: float

    @property
    def options(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_tokens, "max_speech_seconds": self.max_speech}


class _Noise(VisionInput):
    """A video of which every frame pair is the same noise."""

    _patches: np.ndarray

    @classmethod
    def instead_of(cls, shown: VisionInput, config: ThinkerConfig) -> _Noise:
        found = cls(shown.grid, shown.slots, shown.frames, shown.format, shown.seconds_per_grid)
        size = (shown.grid[1] * shown.grid[2], config.vision.patch_values)
        drawn = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
        object.__setattr__(found, "_patches", drawn)
        return found

    def patches(self, pair: int) -> np.ndarray:
        return self._patches


def noisy_prompt(config: ThinkerConfig, seconds: int) -> Prompt:
    """A video and its sound, both noise."""
    blank = video_prompt(config, seconds)
    rng = np.random.default_rng(1)
    heard = blank.audio[0]
    drawn = rng.standard_normal(heard.features.shape, dtype=np.float32)
    return replace(
        blank,
        vision=tuple(_Noise.instead_of(item, config) for item in blank.vision),
        audio=(replace(heard, features=drawn),),
    )


class DriverPeak:
    """The most that the driver says this process holds, context included; asked all the time.

    The context counts as it was measured when the device was opened; from there on every byte that
    leaves the device's free memory is taken to be ours.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._base = device.context_bytes() + int(self._module.memory_reserved())
        self._used_then = self._used()
        self._peak = 0
        self._done = threading.Event()

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self._device.type)

    def _used(self) -> int:
        free, total = self._module.mem_get_info()
        return int(total) - int(free)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Ask until the block ends."""
        self._peak = 0
        self._done.clear()
        thread = threading.Thread(target=self._ask)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _ask(self) -> None:
        while True:
            self._peak = max(self._peak, self._used())
            if self._done.wait(0.004):
                return

    @property
    def peak_bytes(self) -> int:
        """Of the last block."""
        return self._base + self._peak - self._used_then


def open_model(model: str, device: str, budget: int | None) -> LowVRAMOmni:
    """A model of random weights, not yet loaded, within `budget` bytes (None: all that is free)."""
    return LowVRAMOmni(
        RandomCheckpoint.of(model),
        max_memory=budget,
        device=device,
        dtype="auto",
        speech=True,
        seed=0,
        allow=(),
        kernel="auto",
    )


def facts(model: str, device: str, cases: list[Case]) -> dict[str, Any]:
    """The device, and the smallest budget of each case, from its own measured context."""
    with open_model(model, device, None) as omni:
        least = {}
        for case in cases:
            shape = noisy_prompt(omni.checkpoint.config.thinker, case.video_seconds).shape
            with mock.patch.object(lowvram.omni, "measure", lambda *_, found=shape, **__: found):
                plan = omni.plan(WORDS, **case.options)
            least[str(case.video_seconds)] = plan.minimum_budget_bytes
        # A second one could not measure the context any more.
        opened = omni._device
    return {
        "device": opened.name,
        "device_name": _name_of(opened),
        "torch": torch.__version__,
        "total_bytes": opened.total_bytes(),
        "context_bytes": opened.context_bytes(),
        "dtype": plan.dtype,
        "minimum_budget_bytes": least,
    }


def _name_of(device: Device) -> str:
    if device.copy_lane() is None:
        return device.name
    return str(torch.get_device_module(device.type).get_device_name())


def requests(
    model: str, device: str, budget: int, cases: list[Case], until: float
) -> Iterator[Any]:
    """A row for every case in turn, of one process and one budget. None begins that would not be
    done at `until` (`time.monotonic`), by what the case before it took."""
    with open_model(model, device, budget) as omni:
        peak = DriverPeak(omni._device) if omni._device.copy_lane() is not None else None
        pace = 0.0  # seconds a second of video
        for case in cases:
            begun = time.monotonic()
            row = {"budget_bytes": budget, "video_seconds": case.video_seconds}
            if begun + pace * case.video_seconds > until:
                yield row | {"left_out": "no time left"}
                continue
            yield row | answered(omni, case, peak)
            pace = (time.monotonic() - begun) / case.video_seconds


def answered(omni: LowVRAMOmni, case: Case, peak: DriverPeak | None) -> dict[str, Any]:
    """One request, and what it took."""
    prompt = noisy_prompt(omni.checkpoint.config.thinker, case.video_seconds)
    row: dict[str, Any] = {"prompt_tokens": len(prompt.ids)}
    with mock.patch.object(lowvram.omni, "prepare", lambda *_, **__: prompt):
        try:
            if peak is None:
                return row | _told(omni, case)
            with peak.watching():
                row |= _told(omni, case)
            return row | {"driver_peak_bytes": peak.peak_bytes}
        except DoesNotFitError as error:
            least = error.plan.minimum_budget_bytes if error.plan is not None else None
            return row | {"fits": False, "error": str(error), "minimum_budget_bytes": least}


def _told(omni: LowVRAMOmni, case: Case) -> dict[str, Any]:
    text, report = [], None
    moved = [omni._loader.bytes_streamed]
    silent, finite = True, True
    for event in omni.stream(WORDS, **case.options):
        if isinstance(event, TextDelta):
            text.append(time.perf_counter())
            moved.append(omni._loader.bytes_streamed)
        elif isinstance(event, AudioChunk):
            finite = finite and bool(np.isfinite(event.samples).all())
            silent = silent and not event.samples.any()
        elif isinstance(event, Finished):
            report = event.result.report
    assert report is not None
    seconds = text[-1] - text[0]
    streamed = moved[-1] - moved[1]
    return _figures(report) | {
        "fits": True,
        "sound": "nan" if not finite else "silence" if silent else "noise",
        "decode_tokens_per_s": (len(text) - 1) / seconds if seconds else None,
        "decode_streamed_bytes": streamed,
        "decode_streamed_bytes_per_s": streamed / seconds if seconds else None,
    }


def _figures(report: Report) -> dict[str, Any]:
    names = (
        "predicted_peak_bytes",
        "measured_peak_bytes",
        "first_text_s",
        "first_audio_s",
        "total_s",
        "bytes_host_to_device",
        "host_peak_bytes",
        "reply_tokens",
        "audio_seconds",
        "real_time_factor",
    )
    phases = {
        p.name: [p.seconds, p.predicted_peak_bytes, p.measured_peak_bytes] for p in report.phases
    }
    return {name: getattr(report, name) for name in names} | {
        "phases": phases,
        "notes": list(report.notes),
    }


def copies(model: str, device: str, passes: int) -> dict[str, Any]:
    """How fast layers pass through slabs when nothing is computed, against plain copies of the
    same size from pinned memory."""
    checkpoint, opened = RandomCheckpoint.of(model), open_device(device)
    dtype = torch.bfloat16
    loader = Loader(
        checkpoint.store,
        opened,
        Meter(opened),
        build_parts(checkpoint, dtype, speech=False, kernel="auto"),
    )
    try:
        return _passed(loader, opened, checkpoint.config.thinker.text.num_hidden_layers, passes)
    finally:
        loader.close()


def _passed(loader: Loader, device: Device, layers: int, passes: int) -> dict[str, Any]:
    sizes = loader.unit_bytes("text")[:layers]
    placement = Placement(
        streamed=tuple(range(layers)), slabs=2, slab_bytes=max(sizes), source="pinned"
    )
    loader.load("text", placement)
    stream = loader.stream("text")

    def once() -> None:
        for index in range(layers):
            with stream.unit(index):
                pass

    once()
    device.synchronize()
    before, begun = loader.bytes_streamed, time.perf_counter()
    for _ in range(passes):
        once()
    device.synchronize()
    seconds, moved = time.perf_counter() - begun, loader.bytes_streamed - before
    loader.drop("text")
    return {
        "unit_bytes": max(sizes),
        "streamed_bytes_per_s": moved / seconds,
        "plain_copy_bytes_per_s": _plain(device, max(sizes), layers * passes),
        "notes": loader.notes,
    }


def _plain(device: Device, nbytes: int, times: int) -> float:
    """Bytes a second of copies one after the other, from pinned memory where there is any."""
    lane: CopyLane | None = device.copy_lane()
    source = torch.zeros(nbytes, dtype=torch.uint8) if lane is None else lane.host_buffer(nbytes)
    target = torch.zeros(nbytes, dtype=torch.uint8, device=device.torch)
    device.synchronize()

    def once() -> None:
        if lane is None:
            target.copy_(source)
        else:
            lane.copy(target, source)

    once()
    device.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        once()
    device.synchronize()
    return nbytes * times / (time.perf_counter() - begun)
