"""The two solvers of the flow from noise to mel, on the reference time grid.

Times and step lengths live on the host in fp32, computed in the order of the reference, so that
every device integrates over the same numbers and no device value steers the loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.settings import EVALUATIONS_PER_STEP, Solver

SWAY = -1.0
"""Sway sampling (F5-TTS, arXiv 2410.06885): below 0 the grid is denser near the noise."""

EVERYTHING = slice(None)


def time_grid(points: int) -> Tensor:
    """Times from 0 (noise) to 1 (mel), fp32 [points] on the host.

    Ten points are the default of transformers and of the official low-VRAM mode.
    """
    times = torch.linspace(0, 1, points, dtype=torch.float32, device="cpu")
    return times + SWAY * (torch.cos(torch.pi / 2 * times) - 1 + times)


def field_times(grid: Tensor, solver: Solver) -> Tensor:
    """The times at which the field is asked for, ascending: fp32 [times] on the host.

    Args:
        grid: fp32 [points] from `time_grid`.
        solver: `euler` asks once per interval, at its start; `rk4` at both ends, which neighbouring
            intervals share, and at two times between.
    """
    starts, ends = grid[:-1], grid[1:]
    if solver == "euler":
        return starts
    steps = ends - starts
    inner = (starts + steps * (1 / 3), starts + steps * (2 / 3))
    return torch.cat((torch.stack((starts, *inner), dim=1).flatten(), ends[-1:]))


class Flow:
    """States on their way from noise to mel, frame by frame along the first axis.

    Every frame is at an evaluation of its own: `point` says where the field is to be asked next,
    `take` what it answered there. `euler` is the solver of the official low-VRAM mode
    (QwenLM/Qwen2.5-Omni, low-VRAM-mode), `rk4` the 3/8 rule that transformers uses.
    """

    def __init__(self, start: Tensor, grid: Tensor, solver: Solver) -> None:
        self._steps = (grid[1:] - grid[:-1]).tolist()
        self._stages = EVALUATIONS_PER_STEP[solver]
        self.evaluations = len(self._steps) * self._stages
        # The state, and the slopes of a step that is under way.
        self._buffers = [start.clone(), *(torch.empty_like(start) for _ in range(self._stages - 1))]

    @property
    def state(self) -> Tensor:
        """Where every frame is, at the end of its last step."""
        return self._buffers[0]

    def time(self, evaluation: int) -> int:
        """Index in `field_times` of the time of an evaluation."""
        # Of the four stages of a step, the last is at the time of the next step's first.
        return evaluation - evaluation // self._stages if self._stages > 1 else evaluation

    def point(self, evaluation: int, frames: slice = EVERYTHING) -> Tensor:
        """Where the field is asked for those frames, each of which has taken all before."""
        step, stage = divmod(evaluation, self._stages)
        length = self._steps[step]
        state, *slopes = (buffer[frames] for buffer in self._buffers)
        if stage == 0:
            return state
        if stage == 1:
            return state + length * slopes[0] * (1 / 3)
        if stage == 2:
            return state + length * (slopes[1] - slopes[0] * (1 / 3))
        return state + length * (slopes[0] - slopes[1] + slopes[2])

    def take(self, evaluation: int, velocity: Tensor, frames: slice = EVERYTHING) -> None:
        """The field's velocity at that point of those frames; their states change in place."""
        step, stage = divmod(evaluation, self._stages)
        length = self._steps[step]
        state, *slopes = (buffer[frames] for buffer in self._buffers)
        if stage < len(slopes):
            slopes[stage].copy_(velocity)
        elif slopes:
            k1, k2, k3 = slopes
            state.add_((k1 + 3 * (k2 + k3) + velocity) * length / 8)
        else:
            state.add_(velocity * length)

    def slide(self, passed: int, start: Tensor) -> None:
        """The first `passed` frames go, and `start` [n, ..] comes after the others."""
        state, *slopes = self._buffers
        room = torch.empty_like(start)
        self._buffers = [torch.cat((state[passed:], start))]
        self._buffers += [torch.cat((slope[passed:], room)) for slope in slopes]
