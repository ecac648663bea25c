"""The two solvers of the flow from noise to mel, on the reference time grid.

Times and step lengths live on the host in fp32, computed in the order of the reference, so that
every device integrates over the same numbers and no device value steers the loop.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowvram.settings import EVALUATIONS_PER_STEP, Solver

SWAY = -1.0
"""Sway sampling (F5-TTS, arXiv 2410.06885): below 0 the grid is denser near the noise."""

Field = Callable[[int, Tensor], Tensor]
"""Velocity of a state at the time of this index in `field_times`."""


def time_grid(points: int) -> Tensor:
    """Times from 0 (noise) to 1 (mel), fp32 [points] on the host.

    Ten points are the default of transformers and of the official low-VRAM mode.
    """
    times = torch.linspace(0, 1, points, dtype=torch.float32, device="cpu")
    return times + SWAY * (torch.cos(torch.pi / 2 * times) - 1 + times)


def evaluations(points: int, solver: Solver) -> int:
    """How often `integrate` asks for the field on a grid of so many points."""
    return (points - 1) * EVALUATIONS_PER_STEP[solver]


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


def integrate(field: Field, start: Tensor, grid: Tensor, solver: Solver) -> Tensor:
    """The state at the end of `grid`, of the shape of `start`.

    `euler` is the solver of the official low-VRAM mode (QwenLM/Qwen2.5-Omni, low-VRAM-mode),
    `rk4` the 3/8 rule that transformers uses.
    """
    state = start
    for i, length in enumerate((grid[1:] - grid[:-1]).tolist()):
        if solver == "euler":
            state = state + field(i, state) * length
        else:
            state = state + _rk4_step(field, 3 * i, state, length)
    return state


def _rk4_step(field: Field, first: int, state: Tensor, length: float) -> Tensor:
    k1 = field(first, state)
    k2 = field(first + 1, state + length * k1 * (1 / 3))
    k3 = field(first + 2, state + length * (k2 - k1 * (1 / 3)))
    k4 = field(first + 3, state + length * (k1 - k2 + k3))
    return (k1 + 3 * (k2 + k3) + k4) * length / 8
