"""How much a metric falls when one group loses units, cell by cell, resumably."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from prunus.errors import FormatError, PlanError
from prunus.files import check_target
from prunus.graph.coupling import CouplingGraph
from prunus.graph.progress import Progress, following
from prunus.importance import name_of
from prunus.planner.options import ScoreKeywords, ScoreOptions, takes_options
from prunus.planner.search.experiment import Experiment, Metric, check_ratios
from prunus.planner.search.sensitivity_table import Sensitivity, check_loss, units_at
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
    path: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[ScoreKeywords],
) -> Sensitivity:
    """Measure how a metric falls when one group after the other loses units; nothing is cut.

    Every cell is the metric of a masked model (:func:`prunus.mask`), which answers as the cut one
    would.  A group is all that is pruned together: a residual stream is one row, and so are groups
    that lose units together.

    Parameters
    ----------
    graph, model
        What :func:`prunus.trace` returned, and its model.
    metric
        Called with the model in eval mode and without gradients; returns a finite number, of which
        more is better (accuracy, or minus a loss), the same one for the same model.
    ratios
        Shares of its units that each group loses, in (0, 1).
    tolerance
        By how much the metric may fall: then :attr:`Sensitivity.tolerated` has, for every group,
        the largest share found by a binary search over numbers of units, which takes for granted
        that a group which has lost more is not better.
    path
        A JSON file that is written after each cell.  If it is there already, what it has is not
        measured again.
    progress
        Called with what was measured, in words, the number of cells done, and how many there are.
    **options

    Returns
    -------
    Sensitivity
        The table.  :func:`~prunus.planner.search.plan_by_sensitivity` makes a plan of it, within a
        budget or with what is tolerated.

    Raises
    ------
    PlanError
        If a ratio or the tolerance is none, or no group can lose units.
    DataError
        If the metric returns something else than a finite number, or the importance lacks data.
    FormatError
        If the file at ``path`` is no such table, or one of other weights, scores or metric.

    Examples
    --------
    >>> import prunus, torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)
    >>> graph = prunus.trace(net, torch.ones(1, 4))
    >>> whole = net(torch.ones(1, 4))
    >>> def closeness(model):
    ...     return -float((model(torch.ones(1, 4)) - whole).norm())
    >>> table = prunus.planner.search.sensitivity(graph, net, closeness, ratios=[0.25, 0.5])
    >>> list(table.sizes.items()), table.dense == 0
    ([('0.weight[0]', 8)], True)
    """
    ratios = check_ratios(ratios)
    if tolerance is not None:
        check_loss(tolerance, "tolerance")
    if path is not None:
        check_target(path)
    with following(progress) as tell:
        tell("scoring", 0, None)
        experiment = Experiment.of(graph, model, ScoreOptions(**options))
        rows = experiment.rows(ratios)
        dense = experiment.value(metric, graph.all_kept, "the whole model")
        table = _begin(experiment, dense, ratios, rows, path)

        def report(text: str) -> None:
            done = sum(len(curve) - 1 for curve in table.curves.values())
            tell(text, done, len(rows) * len(ratios) if tolerance is None else None)

        report(f"the whole model: {dense:.6g}")
        cells = _Cells(experiment, metric, table, path, report)
        for name in rows:
            for ratio in ratios:
                cells.measure(name, units_at(table.sizes[name], ratio))
        if tolerance is not None:
            found = {name: cells.search(name, tolerance, max(ratios)) for name in rows}
            table = replace(table, tolerated=found, tolerance=tolerance)
    if path is not None:
        table.save(path)
    return table


def _begin(
    experiment: Experiment,
    dense: float,
    ratios: tuple[float, ...],
    rows: Mapping[str, float],
    path: str | Path | None,
) -> Sensitivity:
    """A table of the whole model alone, and of what the file has."""
    graph = experiment.graph
    origin = {
        "importance": name_of(experiment.importance),
        "seed": experiment.asked.seed,
        "fingerprint": experiment.fingerprint(),
    }
    known: dict[str, dict[int, float | None]] = {name: {0: dense} for name in rows}
    if path is not None and Path(path).exists():
        old = Sensitivity.load(path)
        _check_same(old, dense, origin, path)
        for name, curve in old.curves.items():
            known.setdefault(name, {}).update(curve)
    sizes = {group.name: group.size for group in graph.groups if group.name in known}
    return Sensitivity(dense, ratios, sizes, known, origin=origin)


class _Cells:
    """Measures cells into the curves of a table, and keeps its file up to date."""

    def __init__(
        self,
        experiment: Experiment,
        metric: Metric,
        table: Sensitivity,
        path: str | Path | None,
        tell: Callable[[str], None],
    ) -> None:
        self._experiment, self._metric, self._table = experiment, metric, table
        self._path, self._tell = path, tell

    def measure(self, name: str, units: int) -> float | None:
        """The metric where so many units of a group are asked to go; None where they can't."""
        curve = self._table.curves[name]
        if units not in curve:
            assert isinstance(curve, dict)
            curve[units] = value = self._evaluate(name, units)
            if self._path is not None:
                self._table.save(self._path)
            said = "can't go" if value is None else f"{value:.6g}"
            self._tell(f"{name} without {units} of {self._table.sizes[name]}: {said}")
        return curve[units]

    def _evaluate(self, name: str, units: int) -> float | None:
        if units >= self._table.sizes[name]:
            return None
        try:
            kept = self._experiment.kept({name: units / self._table.sizes[name]})
        except PlanError:  # the scores are there already: what is left to refuse is this ratio
            return None
        if kept.all():
            return self._table.dense
        return self._experiment.value(self._metric, kept, f"{name} without {units} units")

    def search(self, name: str, tolerance: float, most: float) -> float:
        """The largest share, of those up to ``most``, that a bisection finds to be tolerated."""
        size, bound = self._table.sizes[name], self._table.dense - tolerance
        low, high = 0, units_at(size, most) + 1
        for units in sorted(units for units in self._table.curves[name] if units < high):
            value = self._table.curves[name][units]
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


def _check_same(
    old: Sensitivity, dense: float, origin: Mapping[str, Any], path: str | Path
) -> None:
    """Refuse to go on with numbers that were made in another way."""
    why = ""
    if dict(old.origin) != dict(origin):
        why = "its weights, importance, calibration data or seed are not those of this run"
    elif not math.isclose(old.dense, dense, rel_tol=1e-6, abs_tol=1e-9):
        why = f"the metric of the whole model was {old.dense:g} then and is {dense:g} now"
    if why:
        raise FormatError(
            f"{path} has the numbers of another run",
            why=why,
            fix="give another path, or remove the file",
        )
