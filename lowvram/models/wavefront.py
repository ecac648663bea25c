"""An utterance's mel frames exactly as if made at once, with each evaluation done once.

Only layers that look ahead need the block after their own. So a block waits before each of them
until the next has come that far, and an evaluation is as many blocks behind the one before it as
there are such layers: one in the published model, whose nine evaluations are nine blocks (2.16 s)
apart. Nothing is computed twice but the waiting block's keys and values, and what is kept does not
grow with the speech.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram.models.dit import Condition, DiT, Speaker
from lowvram.models.ode import Flow
from lowvram.models.past import BRANCHES, Held, Neighbour, Past
from lowvram.settings import Solver


class _Window(NamedTuple):
    """Mel frames of the utterance."""

    start: int
    stop: int

    @property
    def frames(self) -> int:
        return self.stop - self.start


class Wavefront:
    """One utterance under way; `advance` takes its codes in pieces and gives what is finished.

    Frames that are not finished are each at an evaluation of their own, later ones further back.
    """

    def __init__(
        self, dit: DiT, speaker: Speaker, modulation: Tensor, grid: Tensor, solver: Solver
    ) -> None:
        """`modulation` is [times, rows, hidden] for the `field_times` of grid and solver."""
        config, device = dit.config, dit.proj_out.weight.device
        self._dit, self._speaker, self._modulation = dit, speaker, modulation
        self._flow = Flow(torch.empty(0, config.mel_dim, device=device), grid, solver)
        self._past = Past(config, self._flow.evaluations, device, dit.dtype)
        self._kept = torch.empty(
            self._flow.evaluations,
            len(config.look_ahead_layers),
            BRANCHES,
            config.block_size,
            config.hidden_size,
            device=device,
            dtype=dit.dtype,
        )
        self._codes: list[int] = []  # of the frames in `_flow`
        self._first = 0  # of them
        self._front = 0  # blocks that have come in
        self._finished = 0  # frames at the head of `_flow`

    @property
    def tensors(self) -> list[Tensor]:
        """What stays from the first tick to the last."""
        return [*self._past.tensors, self._kept]

    def advance(self, codes: Sequence[int], noise: Tensor, blocks: int) -> Tensor:
        """The front moves on by so many blocks; the mel frames finished by that, on the device.

        Args:
            codes: those of the blocks; fewer where the speech ends, none after its end.
            noise: fp32 for every frame of `codes`, on any device: the start of the flow.
        """
        block = self._dit.config.block_size
        self._flow.slide(self._finished, noise.to(self._flow.state))
        del self._codes[: self._finished // self._dit.config.repeats]
        self._codes.extend(codes)
        self._first += self._finished
        device = self._dit.proj_out.weight.device
        condition = self._dit.condition(
            torch.tensor(self._codes, dtype=torch.int64).to(device), self._speaker, block
        )
        ahead = len(self._dit.config.look_ahead_layers)
        for evaluation in range(self._flow.evaluations):
            self._evaluate(evaluation, evaluation * ahead, blocks, condition)
        result = self._window(self._flow.evaluations * ahead, blocks)
        self._front += blocks
        self._finished = result.frames
        return self._flow.state[: self._finished]

    def _window(self, behind: int, blocks: int) -> _Window:
        """What the next `blocks` blocks are for a layer that is so many blocks behind the front."""
        size = self._dit.config.block_size
        known = self._first + len(self._flow.state)
        start = (self._front - behind) * size
        stop = start + blocks * size
        return _Window(min(max(start, 0), known), min(max(stop, 0), known))

    def _evaluate(self, evaluation: int, behind: int, blocks: int, condition: Condition) -> None:
        """Evaluate the frames whose turn it is, the first layer being so many blocks behind."""
        taken = self._window(behind, blocks)
        past, held, given = self._at_layers(evaluation, behind, blocks)
        if not taken.frames and not any(one.frames for one in held):
            return
        scale = self._dit.config.repeats
        frames = self._place(taken)
        velocity = self._dit(
            self._flow.point(evaluation, frames),
            self._modulation[self._flow.time(evaluation)],
            condition.of(slice(frames.start // scale, frames.stop // scale)),
            past,
            held,
        )
        self._flow.take(evaluation, velocity, self._place(given))

    def _place(self, window: _Window) -> slice:
        return slice(window.start - self._first, window.stop - self._first)

    def _at_layers(
        self, evaluation: int, behind: int, blocks: int
    ) -> tuple[list[Neighbour], list[Held], _Window]:
        """What the layers with neighbours find, and the frames that the last of them gives."""
        config = self._dit.config
        past: list[Neighbour] = []
        held: list[Held] = []
        window = self._window(behind, blocks)
        for layer in range(config.num_hidden_layers):
            if layer in config.look_ahead_layers:
                given = self._window(behind + len(held) + 1, blocks)
                kept = self._kept[evaluation, len(held)]
                held.append(Held(kept, window.start - given.start, given.frames))
                window = given
            if layer in config.look_backward_layers:
                # Nothing comes after a short block.
                final = None if window.stop % config.block_size else window.frames
                past.append(
                    self._past.neighbour(evaluation, len(past), window.start > 0, final or None)
                )
        return past, held, window
