"""How much a metric falls when one group loses units: a table, its file, and its measurement."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from torch import nn

from prunus.errors import FormatError, PlanError, checks_options
from prunus.files import check_target, replace_file
from prunus.graph.coupling import CouplingGraph
from prunus.graph.progress import Progress, following
from prunus.importance import name_of
from prunus.planner.option_values import takes_options
from prunus.planner.options import ScoreKeywords, ScoreOptions
from prunus.planner.search.experiment import Experiment, Metric, check_ratios
from prunus.tracer.wrappers import unwraps

if TYPE_CHECKING:
    from typing_extensions import Unpack

FORMAT, VERSION = "prunus sensitivity", 2

READABLE = (1, 2)
"""Version 1 says the same."""


Units = Annotated[int, msgspec.Meta(ge=0)]


class _Head(msgspec.Struct, frozen=True):
    format: Any
    version: Any


class _Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    units: Units
    metric: dict[Units, float | None]


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    version: int
    origin: dict[str, Any]
    dense: float
    ratios: tuple[float, ...]
    tolerance: float | None
    tolerated: dict[str, float]
    groups: tuple[_Group, ...]


@checks_options
@dataclass(frozen=True)
class Sensitivity:
    """A metric by group and by the units that the group has lost, everything else whole.

    Attributes
    ----------
    dense
        The metric of the whole model; more is better.
    ratios
        The ratios of the table, ascending.
    sizes
        Units of every group of the table, in the model's order.  Groups that lose units together
        are one row, that of the first.
    curves
        Group → number of units asked to go → metric; None where the group can't lose as many.
        Beside the ratios' own numbers, those that the search for a tolerated loss looked at.
    tolerated
        Group → the largest share found by which the metric falls by at most ``tolerance``; empty
        if that was not asked for.
    tolerance
        The loss of the metric that is tolerated; None if that was not asked for.
    origin
        What the numbers were made with: the importance, the seed and a fingerprint of weights and
        scores.
    """

    dense: float
    ratios: tuple[float, ...]
    sizes: Mapping[str, int]
    curves: Mapping[str, Mapping[int, float | None]]
    tolerated: Mapping[str, float] = field(default_factory=dict)
    tolerance: float | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def value(self, group: str, ratio: float) -> float | None:
        """The metric of a cell; None where the group can't lose as many units.

        >>> one = Sensitivity(0.9, (0.5,), {"a": 4}, {"a": {0: 0.9, 2: 0.7}})
        >>> one.value("a", 0.5)
        0.7
        """
        return self.curves[group].get(units_at(self.sizes[group], ratio))

    @property
    def least(self) -> float:
        """The least metric of the table, no more than that of the whole model."""
        values = [v for curve in self.curves.values() for v in curve.values() if v is not None]
        return min([self.dense, *values])

    def ratios_at(self, loss: float) -> dict[str, float]:
        """For every group the largest share by which the metric falls by at most ``loss``.

        Between the numbers of units that were measured the metric is taken for a straight line;
        the first time that it falls below the bound decides.  It is what
        :func:`prunus.plan` takes as ``ratios``.

        Raises
        ------
        PlanError
            If the loss is negative or no number.

        Examples
        --------
        >>> one = Sensitivity(0.9, (0.5,), {"a": 4}, {"a": {0: 0.9, 2: 0.7}})
        >>> round(one.ratios_at(0.1)["a"], 3), one.ratios_at(1.0)
        (0.25, {'a': 0.5})
        """
        check_loss(loss, "loss")
        return {
            group: _crossing(self.curves[group], self.dense - loss) / size
            for group, size in self.sizes.items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; what stands there is the old table or this one, never half of it."""
        document = _Document(
            *(FORMAT, VERSION, dict(self.origin), self.dense, self.ratios, self.tolerance),
            dict(self.tolerated),
            tuple(_Group(n, size, dict(self.curves[n])) for n, size in self.sizes.items()),
        )
        text = msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
        replace_file(path, lambda draft: draft.write_bytes(text))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FormatError
            If it is something else, or of another version.
        """
        try:
            content = Path(path).read_bytes()
            head = msgspec.json.decode(content, type=_Head)
            if head.format != FORMAT or head.version not in READABLE:
                raise ValueError(f"it is {head.format!r} version {head.version!r}")
            document = msgspec.json.decode(content, type=_Document)
        except (OSError, ValueError, RecursionError) as error:  # msgspec's own are ValueErrors
            raise FormatError(
                f"{path} is no table of sensitivities that can be read",
                why=f"{type(error).__name__}: {error}",
                fix="give a file that sensitivity(path=…) wrote, or remove it to start anew",
            ) from error
        return cls(
            *(document.dense, document.ratios),
            sizes={group.name: group.units for group in document.groups},
            curves={group.name: group.metric for group in document.groups},
            **{name: getattr(document, name) for name in ("tolerated", "tolerance", "origin")},
        )


def check_loss(loss: object, option: str) -> None:
    """Refuse a tolerated loss that is none."""
    if not isinstance(loss, (int, float)) or not math.isfinite(loss) or loss < 0:
        raise PlanError(
            f"{option}={loss!r} is no loss of a metric",
            why="it is by how much the metric may fall, where more is better",
            fix=f"give a number from 0 on: {option}=0.01, say",
        )


def units_at(size: int, ratio: float) -> int:
    """The whole number of units that is nearest to a share.

    >>> units_at(10, 0.25), units_at(8, 0.5)
    (3, 4)
    """
    return math.floor(ratio * size + 0.5)


def _crossing(curve: Mapping[int, float | None], bound: float) -> float:
    """How many units can go before the curve first falls below the bound."""
    last, before = 0, math.inf
    for units in sorted(curve):
        value = curve[units]
        if value is None:
            break
        if value < bound:
            share = 0.0 if before == math.inf else (before - bound) / (before - value)
            return last + (units - last) * share
        last, before = units, value
    return last


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
        total = len(rows) * len(ratios) if tolerance is None else None
        cells = _Cells(experiment, metric, table, path, tell, total)
        cells.report(f"the whole model: {dense:.6g}")
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


@dataclass(frozen=True)
class _Cells:
    """Measures cells into the curves of a table, and keeps its file up to date."""

    experiment: Experiment
    metric: Metric
    table: Sensitivity
    path: str | Path | None
    tell: Progress
    total: int | None

    def report(self, text: str) -> None:
        """What was measured, and how many cells are done."""
        self.tell(text, sum(len(curve) - 1 for curve in self.table.curves.values()), self.total)

    def measure(self, name: str, units: int) -> float | None:
        """The metric where so many units of a group are asked to go; None where they can't."""
        curve: Any = self.table.curves[name]
        if units not in curve:
            curve[units] = value = self._evaluate(name, units)
            if self.path is not None:
                self.table.save(self.path)
            said = "can't go" if value is None else f"{value:.6g}"
            self.report(f"{name} without {units} of {self.table.sizes[name]}: {said}")
        return curve[units]  # type: ignore[no-any-return]

    def _evaluate(self, name: str, units: int) -> float | None:
        try:
            kept = self.experiment.kept({name: units / self.table.sizes[name]})
        except PlanError:  # the scores are there already: what is left to refuse is this ratio
            return None
        if kept.all():
            return self.table.dense
        return self.experiment.value(self.metric, kept, f"{name} without {units} units")

    def search(self, name: str, tolerance: float, most: float) -> float:
        """The largest share, of those up to ``most``, that a bisection finds to be tolerated."""
        size, bound = self.table.sizes[name], self.table.dense - tolerance
        low, high = 0, units_at(size, most) + 1
        for units in sorted(units for units in self.table.curves[name] if units < high):
            value = self.table.curves[name][units]
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
