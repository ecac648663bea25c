"""From conversations to what the first decoder layer sees, through the true front of the Thinker.

One module is on the device at a time, and one conversation's media in memory: what has media is
prepared once more for each tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowvram.checkpoint import Checkpoint
from lowvram.conversation import MediaSettings, Prompt, prepare
from lowvram.engine.context import Context
from lowvram.engine.encode import embed_prompt, encode_audio, encode_vision
from lowvram.errors import MediaError, UsageError
from lowvram.offload import Device, Loader, Meter
from lowvram.parts import build_parts
from lowvram.planner.plan import PhasePlan, Plan
from lowvram.quantize.activations import Activations
from lowvram.quantize.calibration import CalibrationSet, Candidate
from lowvram.quantize.progress import Note
from lowvram.quantize.settings import QuantizeSettings

_HELD_OUT = 8
"""Every so many conversations one is kept for judging."""


@dataclass(frozen=True)
class Calibration:
    """Layer-0 inputs and their positions (int64 [3, T] each), and what could not be read."""

    inputs: Activations
    positions: tuple[np.ndarray, ...]
    skipped: int
    tokens: dict[str, int]
    """Tokens seen, by what they stand for: text, vision, audio."""

    def to_json(self) -> dict[str, Any]:
        return {
            "conversations": len(self.inputs),
            "held_out": sorted(self.inputs.held_out),
            "skipped": self.skipped,
            "tokens": self.tokens,
        }


class Front:
    """Prepares conversations and runs embedding and towers."""

    def __init__(
        self, checkpoint: Checkpoint, device: Device, dtype: torch.dtype, seq_len: int, note: Note
    ) -> None:
        self._checkpoint, self._seq_len, self._note = checkpoint, seq_len, note
        self._meter = Meter(device)
        parts = build_parts(checkpoint, dtype, speech=False, kernel="reference")
        self._loader = Loader(checkpoint.store, device, self._meter, parts)
        self._context = Context(
            device=device,
            store=checkpoint.store,
            loader=self._loader,
            meter=self._meter,
            plan=_plan(checkpoint, device, dtype),
            dtype=dtype,
        )

    def run(
        self, found: CalibrationSet, settings: QuantizeSettings, *, budget: int, folder: Path
    ) -> Calibration:
        """The inputs of at most `settings.samples` conversations, each cut to `seq_len` tokens.

        What does not fit into `budget` bytes goes to `folder`.

        Raises:
            MediaError: none of the conversations can be read.
            CheckpointError: tokenizer, template and config do not belong together.
        """
        good, skipped = self._choose(found, settings.samples)
        shapes = [_Cut(candidate, prompt, self._seq_len) for candidate, prompt in good]
        inputs = Activations(
            [cut.tokens for cut in shapes],
            self._checkpoint.config.thinker.text.hidden_size,
            self._context.dtype,
            budget=budget,
            folder=folder,
            device=self._context.device.torch,
            held_out=held_out(len(shapes), settings.seed),
        )
        try:
            self._fill(inputs, shapes)
        except BaseException:
            inputs.close()
            raise
        counts = {kind: sum(cut.counts[kind] for cut in shapes) for kind in _KINDS}
        return Calibration(inputs, tuple(cut.positions for cut in shapes), skipped, counts)

    def _choose(
        self, found: CalibrationSet, wanted: int
    ) -> tuple[list[tuple[Candidate, Prompt]], int]:
        """The first `wanted` conversations that can be prepared (ids and places only are kept)."""
        good: list[tuple[Candidate, Prompt]] = []
        first = ""
        skipped = 0
        for candidate in found.candidates:
            if len(good) == wanted:
                break
            try:
                good.append((candidate, self._prepare(candidate)))
            except (MediaError, UsageError) as error:
                self._note(f"{candidate.label} is left out: {error}")
                skipped, first = skipped + 1, first or str(error)
            else:
                good[-1] = (candidate, _emptied(good[-1][1]))
        if not good:
            raise MediaError(
                f"none of the {skipped} calibration items can be read ({first}); wanted at least "
                "one, or --calibration builtin"
            )
        return good, skipped

    def _fill(self, inputs: Activations, cuts: Sequence[_Cut]) -> None:
        for index, cut in enumerate(cuts):
            with torch.inference_mode():
                inputs[index] = embed_prompt(self._context, cut.prompt)[: cut.tokens]
        for part, kind in (("visual", "vision"), ("audio", "audio")):
            for index, cut in enumerate(cuts):
                if cut.counts[kind]:
                    # Every slot is zero so far, so the sum is exact.
                    inputs[index] = inputs[index].cpu() + self._encode(cut, kind)[: cut.tokens]
            self._loader.drop(part)

    def _encode(self, cut: _Cut, kind: str) -> Tensor:
        """What one tower gives for one conversation, in its slots of [T, H]; zero elsewhere."""
        prompt = self._prepare(cut.candidate)
        config = self._checkpoint.config.thinker
        out = torch.zeros(len(prompt.ids), config.text.hidden_size, dtype=self._context.dtype)
        with torch.inference_mode():
            if kind == "vision":
                encode_vision(self._context, prompt, out)
            else:
                encode_audio(self._context, prompt, out, config.audio)
        return out

    def _prepare(self, candidate: Candidate) -> Prompt:
        checkpoint = self._checkpoint
        # A picture may fill a quarter of the tokens, the four pairs of frames of a film all.
        pixels = max(4, self._seq_len // 4) * (checkpoint.config.thinker.vision.patch_size * 2) ** 2
        return prepare(
            candidate.conversation(),
            tokenizer=checkpoint.tokenizer(),
            config=checkpoint.config.thinker,
            settings=MediaSettings(max_pixels=pixels, max_frames=8),
            speech=False,
            preprocessor=checkpoint.preprocessor,
        )

    def close(self) -> None:
        """Take what is loaded off the device."""
        self._loader.close()


_KINDS = ("text", "vision", "audio")


class _Cut:
    """One conversation, cut to the tokens that are used."""

    def __init__(self, candidate: Candidate, prompt: Prompt, seq_len: int) -> None:
        self.candidate, self.prompt = candidate, prompt
        self.tokens = min(len(prompt.ids), seq_len)
        self.positions = prompt.positions[:, : self.tokens].copy()
        seen = [int((item.slots < seq_len).sum()) for item in prompt.vision]
        heard = [int((item.slots < seq_len).sum()) for item in prompt.audio]
        self.counts = {"vision": sum(seen), "audio": sum(heard)}
        self.counts["text"] = self.tokens - sum(self.counts.values())


def held_out(count: int, seed: int) -> frozenset[int]:
    """Which of `count` conversations are for judging only: an eighth, at least one of several."""
    if count < 2:
        return frozenset()
    order = np.random.default_rng([seed, count]).permutation(count)
    return frozenset(int(i) for i in order[: max(1, count // _HELD_OUT)])


def _emptied(prompt: Prompt) -> Prompt:
    """The prompt without pixels and samples: places are kept."""
    none = np.zeros((0, 0), np.float32)
    return replace(
        prompt,
        vision=tuple(replace(item, frames=none) for item in prompt.vision),
        audio=tuple(replace(item, features=none) for item in prompt.audio),
    )


def _plan(checkpoint: Checkpoint, device: Device, dtype: torch.dtype) -> Plan:
    """Both towers by turns; each stays until all conversations have passed it."""
    rows = (("vision", "visual"), ("audio", "audio"))
    return Plan(
        fits=True,
        model=checkpoint.name,
        device=device.name,
        dtype=str(dtype).removeprefix("torch."),
        budget_bytes=0,
        context_bytes=0,
        guard_bytes=0,
        predicted_peak_bytes=0,
        minimum_budget_bytes=0,
        phases=tuple(
            PhasePlan(
                name=name,
                predicted_peak_bytes=0,
                parts={},
                modules=(part,),
                on_device=(part,),
                reason="one tower at a time",
            )
            for name, part in rows
        ),
        residency={part: "resident" for _, part in rows},
        bytes_to_move=0,
        reasons=(),
    )
