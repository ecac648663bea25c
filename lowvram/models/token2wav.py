"""Codes to sound: the DiT and BigVGAN together, parameters named relative to `token2wav.`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowvram.config import OmniConfig
from lowvram.errors import CheckpointError
from lowvram.models.bigvgan import BigVGAN
from lowvram.models.constants import Constants
from lowvram.models.dit import DiT, Speaker
from lowvram.models.ode import Flow, field_times, time_grid
from lowvram.models.past import Past
from lowvram.models.wavefront import Wavefront
from lowvram.settings import EVALUATIONS_PER_STEP, Solver

if TYPE_CHECKING:
    from lowvram.engine.voice import Voice

TIME_POINTS = 10
"""Points of the time grid: `num_steps` of `Qwen2_5OmniToken2WavModel.forward`."""


@dataclass(frozen=True)
class Utterance:
    """What all pieces of one utterance share: the voice's part of the input, and the times.

    `modulation` is [times, rows, hidden] on the device, one row per time that the solver asks for.
    """

    solver: Solver
    grid: Tensor
    speaker: Speaker
    modulation: Tensor


class Token2Wav(nn.Module):
    """The DiT, which makes mel frames from codes and noise, and the vocoder after it."""

    def __init__(self, config: OmniConfig, dit_dtype: torch.dtype = torch.float32) -> None:
        """`dit_dtype` is that of the DiT's layers; everything else is fp32.

        Against fp32 throughout, `bfloat16` moves mel frames by an rms of 2e-3 (pocket) to 1e-2
        (random networks with strong attention) of their standard deviation, `float16` by 3e-4 to
        1e-3: `benchmarks/vocoder16.py`.
        """
        super().__init__()
        dit, bigvgan = config.dit, config.bigvgan
        if dit is None or bigvgan is None:
            raise CheckpointError("the checkpoint has no speech: use one with talker and token2wav")
        self.code2wav_dit_model = DiT(dit, dit_dtype)
        self.code2wav_bigvgan_model = BigVGAN(bigvgan)
        self.repeats = dit.repeats
        self.codec_rows = dit.num_embeds + 1
        self.samples_per_code = dit.repeats * bigvgan.samples_per_frame

    @torch.no_grad()
    def prepare(
        self,
        voice: Voice,
        solver: Solver = "euler",
        points: int = TIME_POINTS,
        constants: Constants | None = None,
    ) -> Utterance:
        """Computes what does not depend on the codes; good for any number of pieces.

        What `constants` has is not made again; what it has not is put there once it is complete, so
        that this can be repeated after it failed.
        """
        dit = self.code2wav_dit_model
        kept = Constants() if constants is None else constants
        grid = time_grid(points)
        # First what takes more memory than it leaves.
        speaker = kept.speaker(voice.name, lambda: dit.speaker(voice.cond, voice.ref_mel))
        modulation = kept.modulation(
            solver, points, lambda: dit.modulate(field_times(grid, solver))
        )
        device = dit.proj_out.weight.device
        return Utterance(solver, grid, speaker.to(device), modulation.to(device))

    def past(self, utterance: Utterance) -> Past:
        """What the pieces of one utterance hand on to each other; empty, for its first."""
        dit = self.code2wav_dit_model
        calls = (len(utterance.grid) - 1) * EVALUATIONS_PER_STEP[utterance.solver]
        return Past(dit.config, calls, dit.proj_out.weight.device, dit.dtype)

    def wavefront(self, utterance: Utterance) -> Wavefront:
        """Makes an utterance's mel exactly, in pieces; its beginning."""
        return Wavefront(
            self.code2wav_dit_model,
            utterance.speaker,
            utterance.modulation,
            utterance.grid,
            utterance.solver,
        )

    @torch.no_grad()
    def mel(
        self,
        utterance: Utterance,
        codes: Sequence[int],
        noise: Tensor,
        past: Past | None = None,
        final: int | None = None,
    ) -> Tensor:
        """Mel frames [n * repeats, mel_dim] of `n` codes, on the device.

        Args:
            noise: fp32 for every frame of `codes`, on any device: the start of the flow.
            past: of the utterance's earlier pieces; it is led on to the end of this one.
            final: how many of the codes, whole blocks, this piece is about: n. The others are what
                follows, and are heard as far as they reach. Without it, nothing follows.

        Raises:
            CheckpointError: a code that the codec's table has no row for.
        """
        self.check_codes(codes)
        dit = self.code2wav_dit_model
        weight = dit.proj_out.weight
        condition = dit.condition(
            torch.tensor(codes, dtype=torch.int64).to(weight.device),
            utterance.speaker,
            past.frames if past else 0,
        )
        frames = None if final is None else final * self.repeats
        flow = Flow(noise.to(weight), utterance.grid, utterance.solver)
        for evaluation in range(flow.evaluations):
            neighbours = past.neighbours(evaluation, frames) if past else ()
            modulation = utterance.modulation[flow.time(evaluation)]
            velocity = dit(flow.point(evaluation), modulation, condition, neighbours)
            flow.take(evaluation, velocity)
            del velocity  # before the next is made
        if past:
            past.advance()
        return flow.state[:frames]

    def check_codes(self, codes: Sequence[int]) -> None:
        """Refuses codes outside the table on the host: on a device they would end the process.

        Raises:
            CheckpointError: names the first such code.
        """
        for code in codes:
            if not 0 <= code < self.codec_rows:
                raise CheckpointError(
                    f"the Talker gave code {code}, the vocoder knows 0 to {self.codec_rows - 1}: "
                    "its talker and token2wav do not belong together; use another checkpoint"
                )

    def wave(self, mel: Tensor) -> Tensor:
        """Samples [T * 240] in [-1, 1] of mel frames [T, mel_dim], on the device."""
        return self.code2wav_bigvgan_model(mel)

    def forward(
        self, codes: Sequence[int], voice: Voice, noise: Tensor, solver: Solver = "euler"
    ) -> Tensor:
        """A whole utterance in one piece: samples [n * 480] of `n` codes, on the device."""
        return self.wave(self.mel(self.prepare(voice, solver), codes, noise))
