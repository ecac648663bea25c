"""One decoder layer into four bits, with every decision judged by held-out inputs.

Scales on the inputs of linears (`search_scales`, folded by `search_fold`), then the ends of the
ranges (`search_ranges`), one group of linears after the other; last, if asked for, each group is
rounded so that errors make up for each other (`gptq`). The start is rounding to nearest, and
nothing is kept that makes the layer's held-out output worse. Arithmetic is float32.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowvram.errors import CheckpointError

from .gptq import Compensation
from .gptq_inputs import products
from .kernels.reference import dequantize
from .search_fold import GROUP_OF, GROUPS, PRODUCERS, Fold
from .search_grid import (
    LEAST_STEP,
    MOST_STEP,
    Coded,
    Grid,
    clipped_share,
    full_range,
    nearest,
    row_blocks,
)
from .search_inputs import Judge, Seen, look
from .search_layer import (
    LINEARS,
    Capture,
    Forward,
    Geometry,
    LayerInputs,
    LayerResult,
    LinearReport,
    SearchSettings,
    Step,
    Weights,
)
from .search_ranges import best_ranges
from .search_scales import best_scale


@torch.no_grad()
def quantize_layer(
    weights: Weights,
    forward: Forward | None,
    capture: Capture | None,
    inputs: LayerInputs | None,
    geometry: Geometry,
    settings: SearchSettings,
) -> LayerResult:
    """Pack the linears of a layer.

    Args:
        weights: all tensors of the layer, 16- or 32-bit.
        forward, capture, inputs: the layer and its calibration inputs; without them (None, or no
            item) only ranges are searched, by the error of the weights themselves.
        geometry: how value channels belong to query heads.

    Raises `CheckpointError` for a missing tensor, a shape that cannot be packed or a value that is
    no number.
    """
    begun = time.perf_counter()
    _check(weights, settings.group_size)
    search = _Search(weights, geometry, settings)
    if forward is not None and capture is not None and inputs is not None and len(inputs):
        search.see(forward, capture, inputs)
    search.round()
    if settings.method != "rtn":
        for group in GROUPS:
            search.improve(group)
    if settings.method == "awq+gptq":
        for group in GROUPS:
            search.compensate(group)
    return search.result(begun)


def dense_layer(tensors: Mapping[str, Tensor], group_size: int) -> dict[str, Tensor]:
    """A packed layer's tensors -> float32 weights as `forward` takes them: what a reader uses."""
    dense: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        linear, _, kind = name.rpartition(".")
        if linear not in LINEARS or kind == "bias":
            dense[name] = tensor.float()
        elif kind == "qweight":
            stored = (tensor, tensors[f"{linear}.qzeros"], tensors[f"{linear}.scales"])
            dense[f"{linear}.weight"] = dequantize(*stored, group_size).T
    return dense


@dataclass(frozen=True)
class _State:
    """A choice for the whole layer, and its held-out error (None without inputs)."""

    fold: Fold
    coded: Mapping[str, Coded]
    error: float | None = None


@dataclass
class _Search:
    """The way from rounding to nearest to the best choice that was found."""

    weights: Weights
    geometry: Geometry
    settings: SearchSettings
    seen: dict[str, Seen] = field(default_factory=dict)
    judge: Judge | None = None
    source: tuple[Capture, LayerInputs] | None = None
    steps: list[Step] = field(default_factory=list)
    energies: dict[str, float] = field(default_factory=dict)
    """Of each linear's true output, on the tokens its errors are judged by."""

    def see(self, forward: Forward, capture: Capture, inputs: LayerInputs) -> None:
        self.seen = look(self.weights, capture, inputs, self.settings)
        self.judge = Judge(self.weights, forward, inputs, self.settings)
        self.source = capture, inputs

    def round(self) -> None:
        """Start from plain rounding to nearest."""
        fold = Fold(self.weights, self.geometry, self.settings.dtype)
        coded: dict[str, Coded] = {}
        self.rtn_errors: dict[str, float] = {}
        for linear in LINEARS:
            weight = fold.weight(linear)
            grid = full_range(weight, self.settings.group_size)
            coded[linear] = Coded(nearest(weight, grid), grid)
            self.rtn_errors[linear] = self._linear_error(linear, fold, coded[linear])
        self.dense = self._dense(fold, coded)
        self.best = _State(fold, coded, self.judge.error(self.dense) if self.judge else None)
        self.first_error = self.best.error

    def improve(self, group: str) -> None:
        """Try the group's scale and ranges together, then each alone; keep the first that helps."""
        scale = None
        if group in self.seen:
            wanted = self.settings
            scale = best_scale(
                group, self.best.fold, self.seen[group], wanted.group_size, wanted.grid
            )
        attempts = [("scale and ranges", scale, True), ("scale", scale, False)]
        attempts = attempts if scale is not None else []
        attempts.append(("ranges", None, True))
        for tried, s, ranges in attempts:
            if (self.settings.clip or not ranges) and self._attempt(group, tried, s, ranges):
                return

    def compensate(self, group: str) -> None:
        """Round the group anew on the scales and ranges that were found; without inputs, nothing.

        First for what the packed layer gives it, then, if that does not help, for itself alone.
        """
        if self.source is None:
            return
        fold, size = self.best.fold, self.settings.group_size
        layers = (self.weights, self.dense, fold.columns(group))
        found = products(group, *layers, *self.source, size)
        attempts = [("compensation", found)]
        if found.lost is not None:
            attempts.append(("compensation alone", replace(found, lost=None)))
        for tried, known in attempts:
            rounding = Compensation(known)
            changed = {
                linear: rounding.code(fold.weight(linear), self.best.coded[linear].grid)
                for linear in GROUPS[group]
            }
            if self._offer(group, tried, fold, changed):
                return

    def _attempt(self, group: str, tried: str, scale: Tensor | None, ranges: bool) -> bool:
        fold = self.best.fold.with_scale(group, scale)
        changed = {name: self._code(name, fold, ranges) for name in GROUPS[group]}
        for linear, reader in PRODUCERS.items():
            if reader == group and scale is not None:
                changed[linear] = self._follow(linear, fold)
        return self._offer(group, tried, fold, changed)

    def _offer(self, group: str, tried: str, fold: Fold, changed: Mapping[str, Coded]) -> bool:
        """Take the change if the held-out error is smaller with it; whether it was taken."""
        coded = {**self.best.coded, **changed}
        if self.judge is None:
            self.best = _State(fold, coded)
            return True
        assert self.best.error is not None
        dense = {**self.dense, **self._dense(fold, changed)}
        error = self.judge.error(dense)
        kept = error < self.best.error
        self.steps.append(Step(group, tried, self.best.error, error, kept))
        if kept:
            self.best, self.dense = _State(fold, coded, error), dense
        return kept

    def _code(self, linear: str, fold: Fold, ranges: bool) -> Coded:
        group = GROUP_OF[linear]
        weight, columns = fold.weight(linear), fold.columns(group)
        seen = self.seen.get(group)
        if ranges:
            grams = seen.grams_of(columns) if seen else None
            grid = best_ranges(weight, self.settings.group_size, grams)
        else:
            grid = full_range(weight, self.settings.group_size)
        return Coded(nearest(weight, grid), grid)

    def _follow(self, linear: str, fold: Fold) -> Coded:
        """The linear whose outputs a new scale divides: the same grid, with its steps divided."""
        old, rows = self.best.coded[linear].grid, fold.rows(linear)
        before = self.best.fold.rows(linear)
        assert rows is not None
        factor = rows.reciprocal() if before is None else before / rows
        steps = (old.steps * factor.unsqueeze(1)).clamp_(LEAST_STEP, MOST_STEP).half().float()
        grid = Grid(steps, old.zeros)
        return Coded(nearest(fold.weight(linear), grid), grid)

    def _dense(self, fold: Fold, coded: Mapping[str, Coded]) -> dict[str, Tensor]:
        """What the judge runs: the values that will be stored."""
        others = {name: tensor.float() for name, tensor in fold.others().items()}
        return others | {f"{linear}.weight": each.dense() for linear, each in coded.items()}

    def _linear_error(self, linear: str, fold: Fold, coded: Coded) -> float:
        """Energy of the change of a linear's output as a share of its energy."""
        group = GROUP_OF[linear]
        columns, rows = fold.columns(group), fold.rows(linear)
        weight = self.weights[f"{linear}.weight"]
        x = self.seen[group].held_out if group in self.seen else None
        known = self.energies.get(linear)
        energy, changed = 0.0, 0.0
        for part in row_blocks(weight):
            true, change = weight[part].float(), coded.dense(part)
            if rows is not None:
                change.mul_(rows[part].unsqueeze(1))
            if columns is not None:
                change.div_(columns)
            change.sub_(true)
            changed += float((change if x is None else x @ change.T).square().sum())
            if known is None:
                energy += float((true if x is None else x @ true.T).square().sum())
        energy = self.energies.setdefault(linear, energy)
        return changed / energy if energy else 0.0

    def _report(self, linear: str) -> LinearReport:
        coded, fold = self.best.coded[linear], self.best.fold
        return LinearReport(
            linear,
            self.rtn_errors[linear],
            self._linear_error(linear, fold, coded),
            clipped_share(fold.weight(linear), coded.grid),
        )

    def result(self, begun: float) -> LayerResult:
        reports = tuple(self._report(linear) for linear in LINEARS)
        tensors = {name: each.cpu() for name, each in self.best.fold.others().items()}
        for linear, coded in self.best.coded.items():
            tensors |= {f"{linear}.{name}": each for name, each in coded.stored().items()}
        return LayerResult(
            dict(sorted(tensors.items())),
            reports,
            tuple(self.steps),
            self.first_error,
            self.best.error,
            time.perf_counter() - begun,
        )


def _check(weights: Weights, group: int) -> None:
    """Every linear is there, can be packed, and holds numbers only."""
    for linear in LINEARS:
        name = f"{linear}.weight"
        if name not in weights:
            raise CheckpointError(f"the layer has no {name}; wanted a Qwen2.5 decoder layer")
        outputs, columns = weights[name].shape
        if outputs % 8 or columns % group:
            raise CheckpointError(
                f"{name} has shape {[outputs, columns]}; wanted outputs in eights and inputs in "
                f"groups of {group}: try a smaller group size"
            )
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} holds values that are no finite numbers")
