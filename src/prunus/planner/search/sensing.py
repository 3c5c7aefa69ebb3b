"""How much a metric falls when one group loses units, cell by cell, resumably."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prunus.errors import FormatError, PlanError
from prunus.files import check_target
from prunus.graph.coupling import CouplingGraph
from prunus.graph.program import state_of
from prunus.importance import Importance, name_of
from prunus.planner.options import PlanOptions, ScoreKeywords, ScoreOptions, takes_options
from prunus.planner.search.judging import Judge, Metric, batches_to_repair, judge_by
from prunus.planner.search.loose_groups import find_loose, score_once
from prunus.planner.search.sensitivity_table import Sensitivity, check_loss, units_at
from prunus.planner.width_planning import plan_of_mask, plan_widths
from prunus.tracer.wrappers import unwraps

if TYPE_CHECKING:
    from typing_extensions import Unpack

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@takes_options(ScoreOptions)
@unwraps
def sensitivity(
    graph: CouplingGraph,
    model: nn.Module,
    metric: Metric,
    *,
    ratios: Sequence[float] = RATIOS,
    tolerance: float | None = None,
    repaired: bool = False,
    path: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Unpack[ScoreKeywords],
) -> Sensitivity:
    """Measure how a metric falls when one group after the other loses units; nothing is cut.

    Every cell is the metric of a masked model (:func:`prunus.mask`), which answers as the cut one
    would; or, with ``repaired``, of a smaller copy of which what stays was fitted to what went.  A
    group is all that lives and dies together: a residual stream is one row, and so are groups that
    lose units together.

    Parameters
    ----------
    graph, model
        What :func:`prunus.trace` found, and its model.
    metric
        Called with the model, or with ``repaired`` a copy, in eval mode and without gradients;
        returns a finite number, of which more is better (accuracy, or minus a loss), the same one
        for the same model.
    ratios
        Shares of its units that each group loses, in (0, 1).
    tolerance
        By how much the metric may fall: then :attr:`Sensitivity.tolerated` has, for every group,
        the largest share found by a binary search over numbers of units, which takes for granted
        that a group which has lost more is not better.
    repaired
        Measure smaller copies, repaired on the data without labels or training:
        :func:`prunus.compensate`, then :func:`prunus.recalibrate` where that brings the outputs
        nearer to the model's.  The batches are kept in memory, a cell takes some passes over them,
        and copies have to run: leave out groups of which :func:`prunus.verify` says that the
        model's code does not follow.
    path
        A JSON file that is written after each cell.  If it is there already, what it has is not
        measured again.  A file of repaired cells wants the same batches in the same order.
    progress
        Told, in words, what each number was.
    **options

    Returns
    -------
    Sensitivity
        The table.  :func:`prunus.plan_by_sensitivity` makes a plan of it, within a budget or with
        what is tolerated.

    Raises
    ------
    PlanError
        If a ratio or the tolerance is none, or no group can lose units.
    DataError
        If the metric returns something else than a finite number, or the importance or the repair
        lacks data.
    FormatError
        If the file at ``path`` is no such table, or one of other weights, scores, repair or metric.

    Examples
    --------
    >>> import prunus
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)
    >>> graph = prunus.trace(net, torch.ones(1, 4))
    >>> whole = net(torch.ones(1, 4))
    >>> def closeness(model):
    ...     return -float((model(torch.ones(1, 4)) - whole).norm())
    >>> table = prunus.sensitivity(graph, net, closeness, ratios=[0.25, 0.5])
    >>> list(table.sizes.items()), table.dense == 0
    ([('0.weight[0]', 8)], True)
    """
    asked = ScoreOptions(**options)
    asked.check()
    ratios = check_ratios(ratios)
    if tolerance is not None:
        check_loss(tolerance, "tolerance")
    if path is not None:
        check_target(path)
    batches = batches_to_repair(asked.data) if repaired else None
    if batches is not None:
        asked = replace(asked, data=batches)
    settled, scores = score_once(graph, model, asked)
    rows = find_loose(graph, model, settled, ratios, asked.include, asked.exclude)
    origin = {
        "importance": name_of(settled),
        "seed": asked.seed,
        "fingerprint": fingerprint(graph, model, scores),
    }
    judge = judge_by(graph, model, metric, batches)
    if repaired:
        origin["repaired_on"] = judge.repaired_on
    bench = _Bench(graph, model, judge, settled, path, progress or (lambda _: None))
    bench.start(ratios, origin, list(rows))
    for name in rows:
        for ratio in ratios:
            bench.measure(name, units_at(bench.table.sizes[name], ratio))
    if tolerance is not None:
        found = {name: bench.search(name, tolerance, max(ratios)) for name in rows}
        bench.table = replace(bench.table, tolerated=found, tolerance=tolerance)
    bench.keep()
    return bench.table


@dataclass
class _Bench:
    """A run of measurements: the table so far, and what it takes to go on."""

    graph: CouplingGraph
    model: nn.Module
    judge: Judge
    settled: Importance
    path: str | Path | None
    progress: Callable[[str], None]
    table: Sensitivity = field(init=False)

    def start(
        self, ratios: tuple[float, ...], origin: Mapping[str, Any], names: Sequence[str]
    ) -> None:
        """Measure the whole model, and take over what the file has."""
        whole = plan_of_mask(
            self.graph, self.model, self.graph.all_kept, {"traced": self.graph.traced}
        )
        dense = self.judge.dense(whole)
        self.progress(f"the whole model: {dense:.6g}")
        sizes = {name: self.graph.group(name).size for name in names}
        known: dict[str, dict[int, float | None]] = {name: {0: dense} for name in names}
        if self.path is not None and Path(self.path).exists():
            old = Sensitivity.load(self.path)
            _check_same(old, dense, origin, self.path)
            for name, curve in old.curves.items():
                known.setdefault(name, {}).update(curve)
            sizes = {g.name: g.size for g in self.graph.groups if g.name in {*sizes, *old.sizes}}
        self.table = Sensitivity(dense, ratios, sizes, known, origin=origin)

    def measure(self, name: str, units: int) -> float | None:
        """The metric where so many units of a group are asked to go; None where they can't."""
        curve = self.table.curves[name]
        if units not in curve:
            assert isinstance(curve, dict)
            curve[units] = self._evaluate(name, units)
            self.keep()
            told = "can't go" if curve[units] is None else f"{curve[units]:.6g}"
            self.progress(f"{name} without {units} of {self.table.sizes[name]}: {told}")
        return curve[units]

    def search(self, name: str, tolerance: float, most: float) -> float:
        """The largest share, of those up to ``most``, that a bisection finds to be tolerated."""
        size, bound = self.table.sizes[name], self.table.dense - tolerance
        low, high = 0, units_at(size, most) + 1
        for units in sorted(self.table.curves[name]):
            value = self.table.curves[name][units]
            if units >= high:
                break
            if value is None or value < bound:
                high = units
                break
            low = units
        while high - low > 1:
            middle = (low + high) // 2
            value = self.measure(name, middle)
            if value is not None and value >= bound:
                low = middle
            else:
                high = middle
        return low / size

    def keep(self) -> None:
        """Write the table, if there is a file for it."""
        if self.path is not None:
            self.table.save(self.path)

    def _evaluate(self, name: str, units: int) -> float | None:
        ratio = units / self.table.sizes[name]
        if units >= self.table.sizes[name]:
            return None
        try:
            asked = PlanOptions(importance=self.settled, ratios={name: ratio})
            chosen = plan_widths(self.graph, self.model, asked, may_remove_nothing=True)
        except PlanError:  # the scores are there already: what is left to refuse is this ratio
            return None
        if not any(choice.removed for choice in chosen.groups):
            return self.table.dense
        return self.judge.value(chosen, f"{name} without {units} units")


def check_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    """The ratios, ascending.

    Raises
    ------
    PlanError
        If there are none, or one is not in (0, 1).
    """
    given: list[Any] = list(ratios)
    wrong = [r for r in given if not isinstance(r, (int, float)) or not 0 < r < 1]
    if wrong or not given:
        raise PlanError(
            f"ratios={given!r} are no shares of units",
            why=f"{wrong[0]!r} is not between 0 and 1" if wrong else "there are none",
            fix="give numbers between 0 and 1: ratios=(0.25, 0.5, 0.75), say",
        )
    return tuple(sorted({float(ratio) for ratio in given}))


def fingerprint(graph: CouplingGraph, model: nn.Module, scores: NDArray[np.float64]) -> str:
    """A hash of groups, scores and weights: other ones make other numbers."""
    digest = hashlib.sha256(scores.tobytes())
    digest.update(repr([(group.name, group.size) for group in graph.groups]).encode())
    for name, tensor in state_of(model)[0].items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_same(
    old: Sensitivity, dense: float, origin: Mapping[str, Any], path: str | Path
) -> None:
    """Refuse to go on with numbers that were made in another way."""
    why = ""
    ways = ["of repaired copies" if "repaired_on" in o else "masked" for o in (old.origin, origin)]
    if ways[0] != ways[1]:
        why = f"its cells are {ways[0]}, and those of this run are {ways[1]}"
    elif dict(old.origin) != dict(origin):
        why = "its weights, importance, calibration data or seed are not those of this run"
    elif not math.isclose(old.dense, dense, rel_tol=1e-6, abs_tol=1e-9):
        why = f"the metric of the whole model was {old.dense:g} then and is {dense:g} now"
    if why:
        raise FormatError(
            f"{path} has the numbers of another run",
            why=why,
            fix="give another path, or remove the file",
        )
