"""In which pieces speech is made: which codes, mel frames and samples each pass covers.

Pure arithmetic on counts, shared by the vocoding stream and the planner; imports no torch. Passes
follow from the number of codes alone, never from how or when they arrived.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lowvram.errors import UsageError
from lowvram.settings import EVALUATIONS_PER_STEP, SOLVERS, Solver

Stage = Literal["mel", "wave"]


@dataclass(frozen=True, kw_only=True)
class VocodeSettings:
    """How codes become sound.

    Mel frames come in pieces of whole blocks (12 codes of the published models). `blocks` says how
    many blocks each piece has, the last number again and again: small ones first, so that sound
    begins early. A piece hears everything before it, and `look_ahead` blocks after it, which are
    made again when their turn comes: with as many as the solver has evaluations its frames are
    those of the whole utterance, with fewer they are close. The waveform follows from passes over
    the new frames with `vocoder_left_frames` and `vocoder_right_frames` of context: the vocoder
    hears 34 to each side, and 20 leave an error of about 1e-5. `whole` makes one pass of each over
    the whole utterance instead. `time_points` is the length of the solver's time grid (10 in
    transformers), one more than its steps.
    """

    solver: Solver = "euler"
    blocks: tuple[int, ...] = (2, 2, 4, 8)
    look_ahead: int = 1
    vocoder_left_frames: int = 20
    vocoder_right_frames: int = 20
    whole: bool = False
    time_points: int = 10

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UsageError(f"solver is {self.solver!r}; wanted one of {', '.join(SOLVERS)}")
        if not self.blocks or min(self.blocks) < 1 or self.time_points < 2:
            raise UsageError(
                f"pieces of {self.blocks} blocks and {self.time_points} time points; "
                "wanted one number of blocks or more, each at least 1, and at least 2 points"
            )
        contexts = (self.look_ahead, self.vocoder_left_frames, self.vocoder_right_frames)
        if min(contexts) < 0:
            raise UsageError(f"a context of the vocoder is negative: {contexts}; wanted 0 or more")

    @property
    def evaluations(self) -> int:
        """Evaluations of the DiT in one pass; each runs a batch of two."""
        return (self.time_points - 1) * EVALUATIONS_PER_STEP[self.solver]

    def piece_codes(self, index: int, codes_per_block: int) -> int:
        """New codes of a piece, counted from 0, unless the speech ends before."""
        return self.blocks[min(index, len(self.blocks) - 1)] * codes_per_block

    def first_codes(self, codes_per_block: int) -> int:
        """Codes after which there is sound, where speech has as many."""
        return self.piece_codes(0, codes_per_block) + max(1, self.look_ahead * codes_per_block)

    def largest_pass(
        self, codes: int, frames_per_code: int = 2, codes_per_block: int = 12
    ) -> tuple[int, int]:
        """Mel frames of the longest pass of the DiT and of the vocoder, in speech up to `codes`."""
        speech = codes * frames_per_code
        if self.whole:
            return speech, speech
        ahead = self.look_ahead * codes_per_block
        left, right = self.vocoder_left_frames, self.vocoder_right_frames
        longest = max(self.blocks) * codes_per_block * frames_per_code
        mel = wave = done = 0
        for index in range(len(self.blocks) + 1):
            size = self.piece_codes(index, codes_per_block)
            # A piece that others follow, or one that ends the speech.
            here = min(codes - done, size + ahead)
            mel = max(mel, here * frames_per_code)
            waiting = here * frames_per_code + (right if done else 0)
            ending = min(longest, waiting) + min(right, max(0, waiting - longest))
            wave = max(wave, left + max(ending, min(size * frames_per_code + right, waiting)))
            done += size
            if done >= codes:
                break
        return mel, min(wave, speech)


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

    def __init__(
        self, settings: VocodeSettings, frames_per_code: int = 2, codes_per_block: int = 12
    ) -> None:
        self.settings = settings
        self.frames_per_code = frames_per_code
        self.codes_per_block = codes_per_block
        self.codes = 0
        self.finished = False
        self._pieces = 0
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
            self._pieces += 1

    def _next_mel(self) -> Pass | None:
        s, done = self.settings, self._mel_done
        size = s.piece_codes(self._pieces, self.codes_per_block)
        ahead = s.look_ahead * self.codes_per_block
        # One code more even without context: the end of the speech is made after `finish` only, so
        # that it does not matter whether the end was known when the last full piece could run.
        if not s.whole and self.codes - done >= size + max(ahead, 1):
            return Pass("mel", done, done + size + ahead, done, done + size)
        if self.finished and self.codes > done:
            return Pass("mel", done, self.codes, done, self.codes)
        return None

    def _next_wave(self) -> Pass | None:
        s, done, made = self.settings, self._wave_done, self._mel_done * self.frames_per_code
        ended = self.finished and self._mel_done == self.codes
        if s.whole:
            return Pass("wave", 0, made, 0, made) if ended and made > done else None
        ready = made if ended else made - s.vocoder_right_frames
        if ready <= done:
            return None
        longest = max(s.blocks) * self.codes_per_block * self.frames_per_code
        keep_to = min(ready, done + longest)
        start = max(0, done - s.vocoder_left_frames)
        return Pass("wave", start, min(made, keep_to + s.vocoder_right_frames), done, keep_to)


def passes(
    settings: VocodeSettings, codes: int, frames_per_code: int = 2, codes_per_block: int = 12
) -> Iterator[Pass]:
    """Every pass over speech of `codes` codes, in the order in which they run."""
    schedule = Schedule(settings, frames_per_code, codes_per_block)
    schedule.add(codes)
    schedule.finish()
    while step := schedule.next():
        schedule.done(step)
        yield step
