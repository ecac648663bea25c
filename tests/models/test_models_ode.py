"""The solvers: the grid, the order of convergence, and the arithmetic of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowvram.models.ode import Flow, field_times, time_grid
from lowvram.settings import Solver


def integrate(
    field: Callable[[int, Tensor], Tensor], start: Tensor, grid: Tensor, solver: Solver
) -> Tensor:
    """The state at the end of `grid`; the field is asked by index of the time."""
    flow = Flow(start, grid, solver)
    for evaluation in range(flow.evaluations):
        flow.take(evaluation, field(flow.time(evaluation), flow.point(evaluation)))
    return flow.state


def test_grid_is_the_published_one() -> None:
    """The times of the official low-VRAM mode, to the four places they can be checked by hand."""
    wanted = [0, 0.0152, 0.0603, 0.134, 0.234, 0.3572, 0.5, 0.658, 0.8264, 1]
    assert [round(t, 4) for t in time_grid(10).tolist()] == wanted
    assert [round(1 - math.cos(math.pi / 2 * i / 9), 4) for i in range(10)] == wanted


@pytest.mark.parametrize(
    ("solver", "wanted"),
    [("euler", [0, 1, 2]), ("rk4", [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9])],
)
def test_the_field_is_asked_for_every_time_announced(solver: Solver, wanted: list[int]) -> None:
    grid = time_grid(4)
    seen: list[int] = []

    def field(time: int, state: Tensor) -> Tensor:
        seen.append(time)
        return torch.ones_like(state)

    end = integrate(field, torch.zeros(3), grid, solver)
    assert seen == wanted
    assert len(field_times(grid, solver)) == wanted[-1] + 1
    assert torch.allclose(end, torch.ones(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("rk4", 4)])
def test_order_of_convergence(solver: Solver, order: int) -> None:
    """On y' = -2 t y, solved by exp(-t^2); in fp64, to see the fourth order."""

    def error(points: int) -> float:
        grid = torch.linspace(0, 1, points, dtype=torch.float64)
        times = field_times(grid, solver)
        start = torch.ones(1, dtype=torch.float64)
        end = integrate(lambda i, y: -2 * times[i] * y, start, grid, solver)
        return abs(end.item() - math.exp(-1))

    assert math.log2(error(33) / error(65)) == pytest.approx(order, abs=0.2)


@pytest.mark.oracle
def test_runge_kutta_is_that_of_transformers() -> None:
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import RungeKutta4ODESolver

    start = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    grid = time_grid(10)
    asked: list[float] = []

    def velocity(time: Tensor, state: Tensor) -> Tensor:
        asked.append(float(time))
        return torch.sin(3 * state + 5 * time)

    wanted = RungeKutta4ODESolver(function=velocity, initial_value=start).integrate(grid)[-1]
    times = field_times(grid, "rk4")
    ours: list[float] = []

    def same(time: int, state: Tensor) -> Tensor:
        ours.append(float(times[time]))
        return torch.sin(3 * state + 5 * times[time])

    assert torch.equal(integrate(same, start, grid, "rk4"), wanted)
    assert ours == asked
