"""Speech from codes, piece by piece, while the codes are still being drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowvram.engine.pieces import Pass, Schedule, VocodeSettings
from lowvram.engine.voice import Voice
from lowvram.models.constants import Constants
from lowvram.models.past import Past
from lowvram.models.token2wav import Token2Wav, Utterance
from lowvram.models.wavefront import Wavefront


@dataclass(frozen=True, eq=False)
class SpeechPiece:
    """The next samples, float32 mono at 24 kHz, and the codes whose sound ends within them."""

    samples: np.ndarray
    codes: tuple[int, ...]


class NoiseSource:
    """Normal noise by absolute mel frame, from a seed: fp32 on the CPU, the same on every device.

    Drawn code by code and kept only from the beginning of the last window on, so that neither the
    values nor the memory depend on the length of the speech or on the pieces it is made in.
    """

    def __init__(self, seed: int, mel_dim: int = 80, frames_per_code: int = 2) -> None:
        self._generator = torch.Generator(device="cpu").manual_seed(seed)
        self._none = torch.empty(0, mel_dim)
        self._shape = (frames_per_code, mel_dim)
        self._drawn: list[Tensor] = []
        self._first = 0

    def window(self, start: int, stop: int) -> Tensor:
        """Noise of frames `start` to `stop`, [stop - start, mel_dim]; starts must not go back."""
        per_code = self._shape[0]
        passed = start // per_code - self._first
        if passed < 0:
            raise ValueError(f"noise before frame {self._first * per_code} is no longer kept")
        # A window may also begin beyond everything drawn so far: then draw up to it first.
        for _ in range(self._first + len(self._drawn), -(-stop // per_code)):
            self._drawn.append(
                torch.randn(self._shape, generator=self._generator, dtype=torch.float32)
            )
        del self._drawn[:passed]
        self._first += passed
        offset = self._first * per_code
        return torch.cat((self._none, *self._drawn))[start - offset : stop - offset]


class SpeechStream:
    """Turns one utterance's codes into pieces of sound.

    The pieces follow from the sequence of codes alone, not from how it was cut into calls of
    `push`; together they have exactly 480 samples a code. What is kept (a few blocks of codes, mel
    and noise, what does not depend on the codes) does not grow with the speech.
    """

    def __init__(
        self,
        token2wav: Token2Wav,
        voice: Voice,
        noise: NoiseSource,
        settings: VocodeSettings,
        constants: Constants | None = None,
    ) -> None:
        """`constants` are what other utterances of this checkpoint made, and this one may use."""
        self._token2wav = token2wav
        self._constants = constants
        self._voice = voice
        self._noise = noise
        self._settings = settings
        self._frames_per_code = token2wav.repeats
        self._schedule = Schedule(settings, token2wav.code2wav_dit_model.config)
        self._codes: list[int] = []
        self._codes_start = 0
        self._utterance: Utterance | None = None
        self._past: Past | None = None
        self._front: Wavefront | None = None
        self._mel: Tensor | None = None
        self._mel_start = 0

    def push(self, codes: Sequence[int]) -> Iterator[SpeechPiece]:
        """Adds codes; the iterator makes the pieces that have become possible, as it is read.

        Raises:
            CheckpointError: a code that the codec's table has no row for; nothing is added.
        """
        self._token2wav.check_codes(codes)
        self._codes.extend(codes)
        self._schedule.add(len(codes))
        return self._pieces()

    def finish(self) -> Iterator[SpeechPiece]:
        """Ends the speech; the iterator makes the remaining pieces, as it is read."""
        self._schedule.finish()
        return self._pieces()

    def _pieces(self) -> Iterator[SpeechPiece]:
        while step := self._schedule.next():
            if step.stage == "mel":
                self._make_mel(step)
                self._schedule.done(step)
            else:
                piece = self._make_wave(step)
                self._schedule.done(step)
                yield piece

    def prepare(self) -> None:
        """Make what does not depend on the codes, before the first piece wants it. Where this
        fails, as for want of memory, it can be asked for again."""
        if self._utterance is None:
            self._utterance = self._token2wav.prepare(
                self._voice, self._settings.solver, self._settings.time_points, self._constants
            )

    @property
    def tensors(self) -> list[Tensor]:
        """What stays on the device from one pass to the next; modulations that are on the host are
        `constants`."""
        kept = list(self._past.tensors) if self._past else []
        kept += [] if self._mel is None else [self._mel]
        kept += self._front.tensors if self._front else []
        if self._utterance is not None and self._utterance.modulation.device.type != "cpu":
            kept.append(self._utterance.modulation)
        return kept

    def _make_mel(self, step: Pass) -> None:
        self.prepare()
        assert self._utterance is not None
        scale = self._frames_per_code
        noise = self._noise.window(step.start * scale, step.stop * scale)
        codes = self._told(step.start, step.stop)
        if self._settings.exact:
            self._front = self._front or self._token2wav.wavefront(self._utterance)
            new = self._front.advance(codes, noise, step.blocks)
        else:
            self._past = self._past or self._token2wav.past(self._utterance)
            final = step.keep_to - step.start if step.keep_to < step.stop else None
            new = self._token2wav.mel(self._utterance, codes, noise, self._past, final)
        # A copy, so that no more than these frames is kept of what they are a part of.
        self._mel = new.clone() if self._mel is None else torch.cat((self._mel, new))

    def _told(self, start: int, stop: int) -> tuple[int, ...]:
        return tuple(self._codes[start - self._codes_start : stop - self._codes_start])

    def _make_wave(self, step: Pass) -> SpeechPiece:
        assert self._mel is not None
        # Passes begin no earlier than the one before: what lies before this one is done with.
        self._mel = self._mel[step.start - self._mel_start :]
        self._mel_start = step.start
        wave = self._token2wav.wave(self._mel[: step.length])
        per_code = self._token2wav.samples_per_code
        per_frame = per_code // self._frames_per_code
        kept = wave[
            (step.keep_from - step.start) * per_frame : (step.keep_to - step.start) * per_frame
        ]
        first = step.keep_from * per_frame // per_code
        last = step.keep_to * per_frame // per_code
        ended = self._told(first, last)
        # Codes whose sound is out were all read before: the vocoder comes after the DiT.
        del self._codes[: last - self._codes_start]
        self._codes_start = last
        return SpeechPiece(_on_host(kept), ended)


def _on_host(samples: Tensor) -> np.ndarray:
    if samples.is_meta:
        return np.zeros(samples.shape, dtype=np.float32)
    # A copy, so that a reader who keeps the samples does not keep the context around them.
    return samples.to(device="cpu", dtype=torch.float32).numpy().copy()
