"""Rounding that compensates: against every choice, against GPTQ as published, in a layer."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from decoder_layer import AWKWARD, LAYER, Items, awkward
from torch import Tensor

from lowvram.quant import LayerResult, SearchSettings, dense_layer
from lowvram.quant.gptq import DAMPING, Compensation
from lowvram.quant.gptq_inputs import Products, products
from lowvram.quant.gptq_round import compensated, factored, feedback
from lowvram.quant.search_fold import GROUPS
from lowvram.quant.search_grid import Grid, full_range, nearest, values

BOTH = SearchSettings(method="awq+gptq")


def correlated(inputs: int, tokens: int, *, seed: int = 0, rank: int | None = None) -> Tensor:
    """Tokens [T, K] whose channels go together and differ in size."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or inputs, inputs, generator=draw)
    mix *= torch.exp(0.7 * torch.randn(inputs, generator=draw))
    return torch.randn(tokens, len(mix), generator=draw) @ mix


def problem(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [N, K] and products [K, K]."""
    draw = torch.Generator().manual_seed(seed)
    x = correlated(inputs, 4 * inputs, seed=seed, rank=max(inputs // 2, 1))
    x += 0.2 * torch.randn(x.shape, generator=draw)
    return torch.randn(outputs, inputs, generator=draw), x.T @ x / len(x)


def dense(q: Tensor, grid: Grid) -> Tensor:
    return values(q.view(*grid.steps.shape, -1), grid).view(q.shape)


def energies(weight: Tensor, found: Tensor, of: Tensor) -> Tensor:
    """Error of each output, [N]."""
    change = (found - weight).double()
    return ((change @ of.double()) * change).sum(1)


def test_against_every_choice_of_integers() -> None:
    """Four weights of sixteen values have 65,536 choices; the best of them is seldom missed far."""
    choices = torch.tensor(list(product(range(16), repeat=4)), dtype=torch.float64)
    found, plain, best = [], [], []
    for seed in range(6):
        weight, of = problem(8, 4, seed)
        grid = full_range(weight, 4)
        q, fitted = compensated(weight, grid, feedback(of, 1e-6), sweeps=1)
        assert torch.equal(fitted.steps, grid.steps), "steps are fitted between sweeps"
        found.append(energies(weight, dense(q, grid), of))
        plain.append(energies(weight, dense(nearest(weight, grid), grid), of))
        for row, step, zero in zip(weight, grid.steps, grid.zeros, strict=True):
            change = (choices - zero) * step - row
            best.append(((change @ of.double()) * change).sum(1).min())
    ours, rounded, least = torch.cat(found), torch.cat(plain), torch.stack(best)
    assert bool((ours >= least * (1 - 1e-9)).all()), "nothing is better than the best of all"
    assert float((ours <= least * (1 + 1e-6)).double().mean()) > 0.4
    assert ours.sum() < 2 * least.sum() and rounded.sum() > 4 * least.sum()


def published(weight: Tensor, grid: Grid, of: Tensor, order: Tensor) -> Tensor:
    """GPTQ as its authors wrote it: the inverse's upper factor, one weight after the other."""
    h = of.double().numpy()[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    w = weight.double().numpy()[:, order].copy()
    group = weight.shape[1] // grid.steps.shape[1]
    q = np.zeros(weight.shape)
    for k, column in enumerate(order.tolist()):
        step = grid.steps[:, column // group].double().numpy()
        zero = grid.zeros[:, column // group].double().numpy()
        q[:, column] = np.clip(np.round(w[:, k] / step) + zero, 0, 15)
        error = (w[:, k] - (q[:, column] - zero) * step) / upper[k, k]
        w[:, k:] -= np.outer(error, upper[k, k:])
    return torch.from_numpy(q).to(torch.uint8)


@pytest.mark.parametrize(("inputs", "group"), [(96, 32), (320, 64), (128, 128)])
def test_the_first_rounding_is_gptq_as_published(inputs: int, group: int) -> None:
    weight, of = problem(24, inputs)
    grid = full_range(weight, group)
    given = feedback(of, 0.01)
    damped, _ = factored(of, 0.01)
    order = of.diagonal().argsort(descending=True)
    assert torch.equal(given.order, order)
    q, _ = compensated(weight, grid, given, sweeps=0)
    assert float((q == published(weight, grid, damped, order)).double().mean()) > 0.999


def test_sweeps_only_ever_lower_the_error_by_which_they_decide() -> None:
    weight, of = problem(40, 256)
    grid, given = full_range(weight, 64), feedback(of, 0.01)
    damped, _ = factored(of, 0.01)
    last = energies(weight, dense(nearest(weight, grid), grid), damped).sum()
    for sweeps, most in ((0, 0.15), (1, 0.995), (2, 0.985), (4, 0.999)):
        q, fitted = compensated(weight, grid, given, sweeps=sweeps)
        now = energies(weight, dense(q, fitted), damped).sum()
        assert now < most * last, sweeps
        last = now
    assert torch.equal(fitted.steps, fitted.steps.half().float())
    assert not torch.equal(fitted.steps, grid.steps)


def test_unrelated_inputs_have_nothing_to_make_up_for() -> None:
    weight, _ = problem(40, 256)
    energy = torch.rand(256, generator=torch.Generator().manual_seed(1)) * 10
    grid = full_range(weight, 128)
    for of in (torch.diag(energy), torch.zeros(256, 256)):
        q, fitted = compensated(weight, grid, feedback(of, 0.01), sweeps=3)
        assert torch.equal(q, nearest(weight, grid))
        assert torch.equal(fitted.steps, grid.steps) and torch.equal(fitted.zeros, grid.zeros)


def singular(kind: str) -> Tensor:
    x = correlated(128, 300)
    if kind == "one token":
        x = x[:1]
    elif kind == "few tokens":
        x = x[:9]
    elif kind == "dead inputs":
        x[:, 10:50] = 0.0
    elif kind == "the same twice":
        x[:, 64:] = x[:, :64]
    elif kind == "of very different size":
        x = x * torch.logspace(-8, 8, 128)
    return torch.full((128, 128), float("inf")) if kind == "overflow" else x.T @ x / len(x)


KINDS = (
    "one token",
    "few tokens",
    "dead inputs",
    "the same twice",
    "of very different size",
    "overflow",
)


@pytest.mark.parametrize("kind", KINDS)
def test_singular_products_give_numbers_and_no_more_error(kind: str) -> None:
    weight, _ = problem(32, 128)
    weight[3], weight[4] = 0.0, 0.25
    of = singular(kind)
    grid = full_range(weight, 64)
    q, fitted = compensated(weight, grid, feedback(of, DAMPING), sweeps=2)
    found = dense(q, fitted)
    assert bool(torch.isfinite(found).all()) and int(q.max()) <= 15
    assert not bool(found[3].any())
    if kind == "overflow":
        assert torch.equal(q, nearest(weight, grid))
        return
    damped, _ = factored(of, DAMPING)
    plain = energies(weight, dense(nearest(weight, grid), grid), damped)
    assert energies(weight, found, damped).sum() < plain.sum()
    if kind == "dead inputs":
        assert torch.equal(q[:, 10:50], nearest(weight, fitted)[:, 10:50])


def test_weights_aim_at_the_outputs_of_true_inputs() -> None:
    """Where packing turned the inputs round, weights on a fine grid turn them back."""
    draw = torch.Generator().manual_seed(2)
    y = correlated(64, 2000)
    x = y @ (torch.eye(64) + 0.1 * torch.randn(64, 64, generator=draw))
    weight = torch.randn(16, 64, generator=draw)
    fine = full_range(weight * 1.5, 32)
    own, lost = (x.T @ x / len(x),), x.T @ (y - x) / len(x)

    def error(found: Products) -> float:
        coded = Compensation(found).code(weight.clone(), fine)
        return float((x @ coded.dense().T - y @ weight.T).square().sum())

    before = float(((x - y) @ weight.T).square().sum())
    assert error(Products(own, lost)) < 0.25 * before < 0.9 * error(Products(own, None))


def gathered(group: str, items: list[Tensor]) -> Products:
    weights = LAYER.weights()
    packed = {name: tensor * 1.1 for name, tensor in weights.items()}
    columns = torch.linspace(0.5, 2, weights[f"{GROUPS[group][0]}.weight"].shape[1])
    return products(group, weights, packed, columns, LAYER.capture, Items(items, 1), 128)


def test_products_are_those_of_the_packed_layers_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    items = LAYER.inputs(3, 40)
    items[1][4, 4] = float("nan")
    whole = gathered("down", items)
    weights = LAYER.weights()
    packed = {name: tensor * 1.1 for name, tensor in weights.items()}
    pairs = [
        [LAYER.capture(w, i, items[i])["mlp.down_proj"] for i in (0, 1)] for w in (packed, weights)
    ]
    x, y = (torch.cat(each) for each in pairs)
    # Attention hands on the token that is no number.
    finite = torch.isfinite(x).all(-1)
    assert int(finite.sum()) == 40
    x, y = x[finite], y[finite] / torch.linspace(0.5, 2, 512)
    assert whole.lost is not None
    assert torch.allclose(whole.own[0], x.T @ x / len(x), rtol=1e-3, atol=1e-4)
    assert torch.allclose(whole.lost, x.T @ (y - x) / len(x), rtol=1e-3, atol=1e-4)
    assert gathered("qkv", items).lost is None, "before the first group nothing was rounded"
    monkeypatch.setattr("lowvram.quant.gptq_inputs.WHOLE", 200)
    cut = gathered("down", items)
    assert cut.lost is None and [len(own) for own in cut.own] == [256, 256]
    for own, start in zip(cut.own, (0, 256), strict=True):
        span = slice(start, start + 256)
        assert torch.equal(own, whole.own[0][span, span])


def test_blocks_are_rounded_each_by_itself() -> None:
    weight, of = problem(16, 384)
    grid = full_range(weight, 64)
    blocks = tuple(of[s, s] for s in (slice(0, 256), slice(256, 384)))
    coded = Compensation(Products(blocks, None)).code(weight.clone(), grid)
    for span, groups in ((slice(0, 256), slice(0, 4)), (slice(256, 384), slice(4, 6))):
        part = Grid(grid.steps[:, groups], grid.zeros[:, groups])
        alone = Compensation(Products((of[span, span],), None)).code(weight[:, span].clone(), part)
        assert torch.equal(coded.q[:, span], alone.q)
        assert torch.equal(coded.grid.steps[:, groups], alone.grid.steps)


@pytest.fixture(scope="module")
def found(items: list[Tensor]) -> LayerResult:
    return LAYER.quantized(LAYER.weights(), items, BOTH)


def test_a_layer_is_far_nearer_on_inputs_nobody_saw(
    items: list[Tensor], found: LayerResult
) -> None:
    weights, unseen = LAYER.weights(), LAYER.inputs(3, seed=99)
    searched = LAYER.quantized(weights, items)
    before = LAYER.error(weights, dense_layer(searched.tensors, 128), unseen)
    after = LAYER.error(weights, dense_layer(found.tensors, 128), unseen)
    assert after < 0.45 * before
    # What the search had found is where compensation begins, and it is told step by step.
    count = len(searched.steps)
    assert found.steps[:count] == searched.steps
    assert [step.tried for step in found.steps[count:]] == ["compensation"] * 4
    assert [step.group for step in found.steps[count:]] == list(GROUPS)
    assert found.steps[count].before == searched.error_after
    assert found.error_after == found.steps[-1].after


def test_what_is_stored_has_the_error_that_was_judged(
    items: list[Tensor], found: LayerResult
) -> None:
    """Also where scales of inputs divide the outputs of the linears before."""
    stored = dense_layer(found.tensors, 128)
    error = LAYER.error(LAYER.weights(), stored, items[-2:])
    assert error == pytest.approx(found.error_after, rel=1e-4)
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in found.tensors.items()}
    assert kinds["scales"] == torch.float16 and kinds["qweight"] == torch.int32


def test_two_runs_give_the_same_bytes(items: list[Tensor], found: LayerResult) -> None:
    again = LAYER.quantized(LAYER.weights(), items, BOTH)
    assert again.steps == found.steps
    for name, tensor in again.tensors.items():
        assert torch.equal(tensor, found.tensors[name]), name


def test_compensation_that_hurts_is_not_kept(items: list[Tensor]) -> None:
    """Two tokens that are nothing like those that judge: what they tell is refused."""
    draw = torch.Generator().manual_seed(9)
    odd = [torch.randn(1, 256, generator=draw) for _ in "12"]
    searched = LAYER.quantized(LAYER.weights(), [*odd, *items[-2:]])
    result = LAYER.quantized(LAYER.weights(), [*odd, *items[-2:]], BOTH)
    tried = [step for step in result.steps if step.tried.startswith("compensation")]
    assert any(not step.kept for step in tried)
    assert {step.tried for step in tried} == {"compensation", "compensation alone"}
    assert result.error_after is not None and searched.error_after is not None
    assert result.error_after <= searched.error_after


@pytest.mark.parametrize("kind", [*AWKWARD, "one token"])
def test_awkward_layers_stay_finite_and_no_worse(kind: str) -> None:
    weights, items = awkward(kind)
    if kind == "one token":
        items = [x[:1] for x in items[:3]]
    result = LAYER.quantized(weights, items, BOTH)
    stored = dense_layer(result.tensors, 128)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in stored.values())
    assert result.error_after is not None and result.error_before is not None
    assert result.error_after <= result.error_before


def test_without_inputs_it_is_the_search_alone() -> None:
    plain, result = (LAYER.quantized(LAYER.weights(), None, s) for s in (SearchSettings(), BOTH))
    assert result.steps == ()
    assert all(torch.equal(t, plain.tensors[name]) for name, t in result.tensors.items())
