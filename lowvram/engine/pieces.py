"""In which pieces speech is made: which codes, mel frames and samples each pass covers.

Pure arithmetic on counts, shared by the vocoding stream and the planner; imports no torch. Passes
follow from the number of codes alone, never from how or when they arrived.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lowvram.config import DiTConfig
from lowvram.errors import UsageError
from lowvram.settings import (
    EVALUATIONS_PER_STEP,
    LOOK_AHEAD,
    PIECES,
    SOLVERS,
    GenerationSettings,
    Solver,
)

Stage = Literal["mel", "wave"]

VOCODER_REACH = 34
"""Mel frames to each side that a sample of the vocoder hears."""

PUBLISHED = DiTConfig()


@dataclass(frozen=True, kw_only=True)
class VocodeSettings:
    """How codes become sound.

    Mel frames come in pieces of whole blocks (12 codes of the published models). `blocks` says how
    many blocks each piece has, the last number again and again: small ones first, so that sound
    begins early. A piece hears everything before it, and `look_ahead` blocks after it, which are
    made again when their turn comes: with as many as the solver has evaluations its frames are
    those of the whole utterance, with fewer they are close. The waveform follows from passes over
    the new frames with `vocoder_left_frames` and `vocoder_right_frames` of context: the vocoder
    hears 34 to each side, and 20 leave an error of about 1e-5.

    `exact` gives the sound of the whole utterance to rounding, with less work: nothing is made
    again, but mel frames are finished as many blocks later as the solver has evaluations (9 blocks
    or 2.16 s; 36 with `rk4`), and both contexts of the vocoder are 34; the other three numbers do
    not count then. `time_points` is the length of the solver's time grid (10 in transformers), one
    more than its steps.
    """

    solver: Solver = "euler"
    blocks: tuple[int, ...] = PIECES
    look_ahead: int = LOOK_AHEAD
    vocoder_left_frames: int = 20
    vocoder_right_frames: int = 20
    exact: bool = False
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

    @classmethod
    def of_request(cls, settings: GenerationSettings) -> VocodeSettings:
        """Those of one request."""
        return cls(
            solver=settings.solver,
            blocks=tuple(settings.pieces),
            look_ahead=settings.look_ahead,
            exact=settings.whole_speech,
        )

    @property
    def evaluations(self) -> int:
        """Evaluations of the DiT for a frame; each runs a batch of two."""
        return (self.time_points - 1) * EVALUATIONS_PER_STEP[self.solver]

    @property
    def left_frames(self) -> int:
        """Of context before the new frames of a pass of the vocoder."""
        return VOCODER_REACH if self.exact else self.vocoder_left_frames

    @property
    def right_frames(self) -> int:
        """Of context after them."""
        return VOCODER_REACH if self.exact else self.vocoder_right_frames

    def ahead(self, dit: DiTConfig) -> int:
        """Codes after a piece that are made with it, and again."""
        return 0 if self.exact else self.look_ahead * dit.codes_per_block

    def behind(self, dit: DiTConfig) -> int:
        """Blocks between the codes that come in and the mel frames that are finished."""
        return self.evaluations * len(dit.look_ahead_layers) if self.exact else 0

    def piece_blocks(self, index: int) -> int:
        """New blocks of a piece, counted from 0, unless the speech ends before."""
        return self.blocks[min(index, len(self.blocks) - 1)]

    def first_codes(self, dit: DiTConfig = PUBLISHED) -> int:
        """Codes after which there is sound, where speech has as many."""
        front = 0
        for index in itertools.count():
            front += self.piece_blocks(index)
            if (front - self.behind(dit)) * dit.block_size > self.right_frames:
                break
        return front * dit.codes_per_block + max(1, self.ahead(dit))

    def largest_pass(
        self, codes: int, dit: DiTConfig = PUBLISHED, *, ended: bool = True
    ) -> tuple[int, int]:
        """Mel frames of the longest pass of the DiT and of the vocoder, in speech up to `codes`;
        or, where it has not `ended`, of those that come before its end."""
        # Speech of more blocks has no longer passes.
        steady = sum(self.blocks) + 2 * max(self.blocks) + self.behind(dit)
        steady += self.look_ahead + -(-self.right_frames // dit.block_size)
        return _largest_pass(self, min(codes, steady * dit.codes_per_block), dit, ended)


@dataclass(frozen=True)
class Pass:
    """One run over `start` to `stop`, after which `keep_from` to `keep_to` is final.

    Counted from the beginning of the speech, in codes for stage `mel` and in mel frames for stage
    `wave`. Of an exact pass of stage `mel` the final codes lie before those that come in, and
    `blocks` is how far the front moves on, be it beyond the end of the speech.
    """

    stage: Stage
    start: int
    stop: int
    keep_from: int
    keep_to: int
    blocks: int = 0

    @property
    def length(self) -> int:
        return self.stop - self.start


class Schedule:
    """Says which pass can run next, as codes are added and the speech ends."""

    def __init__(self, settings: VocodeSettings, dit: DiTConfig = PUBLISHED) -> None:
        self.settings, self.dit = settings, dit
        self.codes = 0
        self.finished = False
        self._pieces = 0
        self._front = 0  # blocks that have come in, exactly
        self._mel_done = 0
        self._wave_done = 0

    def add(self, codes: int) -> None:
        self.codes += codes

    def finish(self) -> None:
        self.finished = True

    def next(self) -> Pass | None:
        """The next pass, until it is `done`; None until there are more codes or the speech ends."""
        return self._next_wave() or (
            self._next_exact() if self.settings.exact else self._next_mel()
        )

    def done(self, step: Pass) -> None:
        if step.stage == "wave":
            self._wave_done = step.keep_to
        else:
            self._mel_done = step.keep_to
            self._front += step.blocks
            self._pieces += 1

    def _next_mel(self) -> Pass | None:
        s, done = self.settings, self._mel_done
        size, ahead = s.piece_blocks(self._pieces) * self.dit.codes_per_block, s.ahead(self.dit)
        # One code more even without context: the end of the speech is made after `finish` only, so
        # that it does not matter whether the end was known when the last full piece could run.
        if self.codes - done >= size + max(ahead, 1):
            return Pass("mel", done, done + size + ahead, done, done + size)
        if self.finished and self.codes > done:
            return Pass("mel", done, self.codes, done, self.codes)
        return None

    def _next_exact(self) -> Pass | None:
        s, per_block = self.settings, self.dit.codes_per_block
        blocks = s.piece_blocks(self._pieces)
        if self.finished:
            left = -(-self.codes // per_block) + s.behind(self.dit) - self._front
            blocks = min(blocks, left) if self.codes else 0
        elif self.codes <= (self._front + blocks) * per_block:
            blocks = 0

        def at(block: int) -> int:
            return min(max(0, block) * per_block, self.codes)

        front, stop = self._front, self._front + blocks
        final = stop - s.behind(self.dit)
        if blocks < 1:
            return None
        return Pass("mel", at(front), at(stop), self._mel_done, at(final), blocks)

    def _next_wave(self) -> Pass | None:
        s, done, made = self.settings, self._wave_done, self._mel_done * self.dit.repeats
        ended = self.finished and self._mel_done == self.codes
        ready = made if ended else made - s.right_frames
        if ready <= done:
            return None
        # No more at a time than came with the piece, so that no ending takes more memory.
        size = s.piece_blocks(max(0, self._pieces - 1)) * self.dit.block_size
        keep_to = min(ready, done + size)
        start = max(0, done - s.left_frames)
        return Pass("wave", start, min(made, keep_to + s.right_frames), done, keep_to)


def passes(
    settings: VocodeSettings, codes: int, dit: DiTConfig = PUBLISHED, *, ended: bool = True
) -> Iterator[Pass]:
    """Every pass over speech of `codes` codes, in the order in which they run; without those that
    wait for its end where it has not `ended`."""
    schedule = Schedule(settings, dit)
    schedule.add(codes)
    if ended:
        schedule.finish()
    while step := schedule.next():
        schedule.done(step)
        yield step


@functools.lru_cache(maxsize=256)
def _largest_pass(
    settings: VocodeSettings, codes: int, dit: DiTConfig, ended: bool
) -> tuple[int, int]:
    """By the speech that ends with a block, or one code before, and the longest."""
    ends = range(dit.codes_per_block, codes + 1, dit.codes_per_block) if ended else ()
    mel = wave = 0
    for count in {codes, *ends, *(end - 1 for end in ends)}:
        for step in passes(settings, count, dit, ended=ended):
            if step.stage == "wave":
                wave = max(wave, step.length)
            else:
                # Of an exact pass, each evaluation takes its own window of so many blocks.
                moved = step.blocks * dit.codes_per_block if settings.exact else step.length
                mel = max(mel, min(moved, count) * dit.repeats)
    return mel, wave
