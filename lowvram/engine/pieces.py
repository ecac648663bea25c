"""In which pieces speech is made: which codes, mel frames and samples each pass covers.

Pure arithmetic on counts, shared by the vocoding stream and the planner; imports no torch. Passes
follow from the number of codes alone, never from how or when they arrived.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lowvram.errors import UsageError
from lowvram.settings import SOLVERS, Solver

Stage = Literal["mel", "wave"]

EVALUATIONS_PER_STEP: dict[Solver, int] = {"euler": 1, "rk4": 4}


@dataclass(frozen=True, kw_only=True)
class VocodeSettings:
    """How codes become sound.

    Mel frames come from passes over `chunk_codes` new codes with `left_codes` before them and
    `right_codes` after them as context, the waveform from passes over the same number of frames
    with `vocoder_left_frames` and `vocoder_right_frames` of context. The defaults are the constants
    of `Qwen2_5OmniToken2WavModel.forward` in `low-VRAM-mode/` of QwenLM/Qwen2.5-Omni. `whole` makes
    one pass of each over the whole utterance instead. `time_points` is the length of the solver's
    time grid (10 in transformers), one more than its steps.

    The codes of context are all that one evaluation of the DiT sees, but not all that several do:
    chunks are close to the whole, not equal to it. The vocoder hears 34 frames to each side; 20
    leave an error of about 1e-5.
    """

    solver: Solver = "euler"
    chunk_codes: int = 48
    left_codes: int = 24
    right_codes: int = 12
    vocoder_left_frames: int = 20
    vocoder_right_frames: int = 20
    whole: bool = False
    time_points: int = 10

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UsageError(f"solver is {self.solver!r}; wanted one of {', '.join(SOLVERS)}")
        if self.chunk_codes < 1 or self.time_points < 2:
            raise UsageError(
                f"chunk_codes is {self.chunk_codes} and time_points {self.time_points}; "
                "wanted at least 1 and 2"
            )
        contexts = (
            self.left_codes,
            self.right_codes,
            self.vocoder_left_frames,
            self.vocoder_right_frames,
        )
        if min(contexts) < 0:
            raise UsageError(f"a context of the vocoder is negative: {contexts}; wanted 0 or more")

    @property
    def evaluations(self) -> int:
        """Evaluations of the DiT in one pass; each runs a batch of two."""
        return (self.time_points - 1) * EVALUATIONS_PER_STEP[self.solver]

    def largest_pass(self, codes: int, frames_per_code: int = 2) -> tuple[int, int]:
        """Mel frames of the longest pass of the DiT and of the vocoder, in speech up to `codes`."""
        speech = codes * frames_per_code
        if self.whole:
            return speech, speech
        chunk = self.chunk_codes * frames_per_code
        mel = (self.left_codes + self.right_codes) * frames_per_code + chunk
        wave = self.vocoder_left_frames + self.vocoder_right_frames + chunk
        return min(mel, speech), min(wave, speech)


@dataclass(frozen=True)
class Pass:
    """One run over `start` to `stop`, of which `keep_from` to `keep_to` is final.

    Counted from the beginning of the speech, in codes for stage `mel` and in mel frames for stage
    `wave`.
    """

    stage: Stage
    start: int
    stop: int
    keep_from: int
    keep_to: int

    @property
    def length(self) -> int:
        return self.stop - self.start


class Schedule:
    """Says which pass can run next, as codes are added and the speech ends."""

    def __init__(self, settings: VocodeSettings, frames_per_code: int = 2) -> None:
        self.settings = settings
        self.frames_per_code = frames_per_code
        self.codes = 0
        self.finished = False
        self._mel_done = 0
        self._wave_done = 0

    def add(self, codes: int) -> None:
        self.codes += codes

    def finish(self) -> None:
        self.finished = True

    def next(self) -> Pass | None:
        """The next pass, until it is `done`; None until there are more codes or the speech ends."""
        return self._next_wave() or self._next_mel()

    def done(self, step: Pass) -> None:
        if step.stage == "wave":
            self._wave_done = step.keep_to
        else:
            self._mel_done = step.keep_to

    def _next_mel(self) -> Pass | None:
        s, done = self.settings, self._mel_done
        start = max(0, done - s.left_codes)
        # One code more even without context: the end of the speech is made after `finish` only, so
        # that it does not matter whether the end was known when the last full chunk could run.
        if not s.whole and self.codes - done >= s.chunk_codes + max(s.right_codes, 1):
            keep_to = done + s.chunk_codes
            return Pass("mel", start, keep_to + s.right_codes, done, keep_to)
        if self.finished and self.codes > done:
            return Pass("mel", start, self.codes, done, self.codes)
        return None

    def _next_wave(self) -> Pass | None:
        s, done, made = self.settings, self._wave_done, self._mel_done * self.frames_per_code
        ended = self.finished and self._mel_done == self.codes
        if s.whole:
            return Pass("wave", 0, made, 0, made) if ended and made > done else None
        ready = made if ended else made - s.vocoder_right_frames
        if ready <= done:
            return None
        keep_to = min(ready, done + s.chunk_codes * self.frames_per_code)
        start = max(0, done - s.vocoder_left_frames)
        return Pass("wave", start, min(made, keep_to + s.vocoder_right_frames), done, keep_to)


def passes(settings: VocodeSettings, codes: int, frames_per_code: int = 2) -> Iterator[Pass]:
    """Every pass over speech of `codes` codes, in the order in which they run."""
    schedule = Schedule(settings, frames_per_code)
    schedule.add(codes)
    schedule.finish()
    while step := schedule.next():
        schedule.done(step)
        yield step
