"""The ways from codes to samples that `token2wav.py` compares: ours, and those of others."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
import torch
from token2wav_model import OFFICIAL_NEW, OFFICIAL_RIGHT, official_pass, official_piece
from torch import Tensor

from lowvram.config import OmniConfig
from lowvram.engine.pieces import VocodeSettings
from lowvram.engine.vocode import NoiseSource, SpeechStream
from lowvram.engine.voice import Voice
from lowvram.models.token2wav import Token2Wav

CONTEXT = 20
"""Mel frames to each side of a pass of the vocoder, in the official mode as in ours."""

THEIR_STEPS = 9
"""Intervals of the solver that transformers takes by default; four evaluations each."""

Way = Callable[[Iterator[int]], Iterator[np.ndarray]]
"""Takes codes as it needs them and gives samples as it has them."""


class TimedToken2Wav(Token2Wav):
    """Notes the seconds that the vocoder takes."""

    wave_s = 0.0

    def wave(self, mel: Tensor) -> Tensor:
        started = time.perf_counter()
        samples = super().wave(mel)
        self.wave_s += time.perf_counter() - started
        return samples


def timed(config: OmniConfig, model: Token2Wav, dit: torch.dtype) -> TimedToken2Wav:
    """The same weights, shared where the type is the same; the DiT's layers in type `dit`."""
    with torch.device("meta"):
        found = TimedToken2Wav(config, dit)
    types = {name: tensor.dtype for name, tensor in found.state_dict().items()}
    weights = {name: tensor.to(types[name]) for name, tensor in model.state_dict().items()}
    found.load_state_dict(weights, assign=True)
    return found.requires_grad_(False).eval()


def streamed(model: Token2Wav, voice: Voice, settings: VocodeSettings) -> Way:
    """As the engine does it, code by code."""

    def run(codes: Iterator[int]) -> Iterator[np.ndarray]:
        stream = SpeechStream(model, voice, NoiseSource(0), settings)
        for code in codes:
            for piece in stream.push([code]):
                yield piece.samples
        for piece in stream.finish():
            yield piece.samples

    return run


def whole(model: Token2Wav, voice: Voice) -> Way:
    """The DiT over all codes at once, then the vocoder over all frames."""

    def run(codes: Iterator[int]) -> Iterator[np.ndarray]:
        spoken = list(codes)
        noise = NoiseSource(0).window(0, len(spoken) * model.repeats)
        yield _on_host(model.wave(model.mel(model.prepare(voice), spoken, noise)))

    return run


def official(model: Token2Wav, voice: Voice) -> Way:
    """The official constants on our modules: four blocks new, two before them and one after made
    with them and let go of."""
    scale, per_frame = model.repeats, model.samples_per_code // model.repeats

    def run(codes: Iterator[int]) -> Iterator[np.ndarray]:
        utterance, noise = model.prepare(voice), NoiseSource(0)
        spoken: list[int] = []
        done, mel = 0, None
        for code in itertools.chain(codes, [None]):
            if code is not None:
                spoken.append(code)
            missing = done + OFFICIAL_NEW + OFFICIAL_RIGHT - len(spoken)
            if missing > 0 and (code is not None or done == len(spoken)):
                continue
            step = official_pass(done, len(spoken))
            done = step.keep_to
            window = noise.window(step.start * scale, step.stop * scale)
            new = official_piece(model, utterance, step, spoken[step.start : step.stop], window)
            first, mel = (0, new) if mel is None else (CONTEXT, _after(mel, new))
            last = len(mel) - (0 if code is None else CONTEXT)
            yield _on_host(model.wave(mel)[first * per_frame : last * per_frame])

    return run


def _after(mel: Tensor, new: Tensor) -> Tensor:
    """New frames after those that have not sounded yet, and as many that have."""
    return torch.cat((mel[-2 * CONTEXT :], new))


class Theirs:
    """The class of transformers with its defaults, on the weights of ours.

    Of the solver's nine steps, which are all the same work, it takes the first `steps`; `dit_s` and
    `wave_s` are what all nine and the vocoder take.
    """

    def __init__(self, config: OmniConfig, model: Token2Wav, voice: Voice, steps: int) -> None:
        from accelerate import init_empty_weights
        from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as theirs
        from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import (
            Qwen2_5OmniToken2WavConfig,
        )

        assert config.dit is not None and config.bigvgan is not None
        shapes = Qwen2_5OmniToken2WavConfig(
            dit_config=asdict(config.dit), bigvgan_config=asdict(config.bigvgan)
        )
        # Parameters are those of ours; buffers are constants, and are made.
        with init_empty_weights(include_buffers=False):
            found = theirs.Qwen2_5OmniToken2WavModel._from_config(shapes, dtype=torch.float32)
        self.model = found.eval()
        weights = model.state_dict()
        self.model.load_state_dict(weights, strict=False, assign=True)
        assert {name for name, _ in self.model.named_parameters()} == set(weights)
        self.model.requires_grad_(False)
        self.attention = str(self.model.code2wav_dit_model.config._attn_implementation)
        self.dit_s = self.wave_s = 0.0
        self._voice, self._steps = voice, steps

    @torch.no_grad()
    def run(self, codes: Iterator[int]) -> Iterator[np.ndarray]:
        begun = time.perf_counter()
        mel = self.model.code2wav_dit_model.sample(
            self._voice.cond,
            self._voice.ref_mel,
            torch.tensor([list(codes)]),
            num_steps=self._steps + 1,
        )
        between = time.perf_counter()
        samples = self.model.code2wav_bigvgan_model(mel)
        self.dit_s = (between - begun) * THEIR_STEPS / self._steps
        self.wave_s = time.perf_counter() - between
        yield samples.numpy()


def _on_host(samples: Tensor) -> np.ndarray:
    return np.zeros(len(samples), np.float32) if samples.is_meta else samples.numpy()
