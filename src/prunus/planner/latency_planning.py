"""A latency budget: solve on a linearised table, look it up again, and correct by the clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from prunus.errors import BudgetError, PlanError
from prunus.graph.axis import Mask
from prunus.graph.budget import Budget, picoseconds
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.latency import LatencyTable, Prediction
from prunus.latency.race import race
from prunus.latency.table import PICOSECONDS
from prunus.planner.allocate import Selection
from prunus.surgeon import apply
from prunus.tracer.copies import duplicate
from prunus.tracer.inputs import rebuild_inputs
from prunus.tracer.trace import quiet_run

TOLERANCE = 0.02
"""How far the measured time may lie from the requested one, as a part of it."""

PAIRS = 15
"""Rounds of dense, pruned and dense forwards in turn, of which the measured ratio is the median."""

_VOID = 0.02
"""How far the dense model may be from itself: else what is measured is void."""

_RACES = 4
"""How often a plan is timed at most; of races that are all void the least disturbed counts."""

_LAST_RESORT = 0.05
"""What is accepted when no plan came that close."""

_CORRECTIONS = 8
"""How many targets are tried at most; a plan for a target is measured by the clock."""

_SOLUTIONS = 4
"""How often the linearised problem is solved for one target."""

_SETTLED = 0.005
"""The table and its linearisation agree this well on the result."""

_TRUST = 0.5
"""How far the point at which the table is linearised moves towards the last result."""

_ROUNDED = 1e-6
"""What the integers of the polynomial are off at most, as a part of the dense time."""

Select = Callable[[CouplingGraph, Mapping[str, int]], Selection]
"""The units that stay of a graph under bounds."""


@dataclass(frozen=True)
class Timed:
    """A choice that meets a latency budget, and what was measured of it.

    Attributes
    ----------
    selection
        The units that stay; no bound on what they retain, which a table in pieces hasn't.
    dense_ns, pruned_ns
        Of the whole models; the pruned one's is the dense one's by the median ratio.
    predicted
        The ratio by the table alone.
    measurements
        How many plans were cut and measured; none if the times are those of the table alone.
    """

    selection: Selection
    dense_ns: float
    pruned_ns: float
    predicted: float
    measurements: int

    @property
    def ratio(self) -> float:
        """Measured: pruned ÷ dense."""
        return self.pruned_ns / self.dense_ns

    def told_in(self, plan: Plan, table: LatencyTable) -> Plan:
        """The plan with its latency among its costs, and in its origin how that was found."""
        origin = {
            "backend": table.backend.name,
            "ratio": self.ratio if self.measurements else None,
            "predicted": self.predicted,
            "measurements": self.measurements,
            "pairs": PAIRS if self.measurements else 0,
        }
        costs = {**plan.costs, "latency_ns": (round(self.dense_ns), round(self.pruned_ns))}
        return replace(plan, costs=costs, origin={**plan.origin, "latency": origin})


def check_table(budget: Any, table: LatencyTable | None) -> None:
    """Refuse a latency budget without a table."""
    if isinstance(budget, Budget) and budget.latency is not None and table is None:
        raise PlanError(
            "a latency budget needs a latency table",
            why="nobody but this machine knows what an operator takes on it",
            fix="latency=prunus.latency.measure(model, args), or --backend on the command line",
        )


def resolve_rounding(round_to: Any, graph: CouplingGraph, table: LatencyTable | None) -> Any:
    """The number that ``"latency"`` stands for; anything else as it is."""
    if round_to != "latency":
        return round_to
    if table is None:
        raise PlanError(
            'round_to="latency" needs a latency table',
            why="only a table that was measured on this machine knows where time steps",
            fix="latency=prunus.latency.measure(model, args), or a number: round_to=8",
        )
    return table.predict(graph).step


def predict_time(graph: CouplingGraph, chosen: Selection, table: LatencyTable) -> Timed:
    """What the units that stay take by the table alone."""
    prediction = table.predict(graph)
    pruned_ns = prediction.time(prediction.widths(chosen.kept))
    return Timed(chosen, table.dense_ns, pruned_ns, pruned_ns / table.dense_ns, 0)


class Timekeeper:
    """Measures plans of one model against the dense one.

    Parameters
    ----------
    graph, model
        What was traced; the model is not modified.
    table
        Its backend runs the models.
    seed
        Of the inputs, which have the traced shapes.
    """

    def __init__(
        self, graph: CouplingGraph, model: nn.Module, table: LatencyTable, seed: int
    ) -> None:
        spec = graph.traced.get("inputs")
        if spec is None:
            raise PlanError(
                "there are no inputs to time the model with",
                why="those of its trace can't be described as plain data",
                fix="trace it with tensors, numbers and containers of them",
            )
        self._model = model
        self._backend = table.backend
        self._inputs = rebuild_inputs(spec, model, seed=seed)
        self._dense = self._run_of(model)

    def compare(self, plan: Plan) -> tuple[float, float]:
        """Median nanoseconds of the dense model, and the median ratio of pruned to dense.

        The dense model runs twice a round: where it differs from itself something else has
        disturbed the clock, and all is timed again.
        """
        pruned = apply(plan, duplicate(self._model))
        with quiet_run(self._model), quiet_run(pruned):
            first, smaller, second = self._race(self._run_of(pruned)).T
        dense = (first + second) / 2
        return float(median(dense)), float(median(smaller / dense))

    def _race(self, pruned: Callable[[], Any]) -> NDArray[np.float64]:
        """Nanoseconds of the dense model, the pruned one, and the dense one, in every round."""
        found: list[tuple[float, NDArray[np.float64]]] = []
        while len(found) < _RACES and (not found or found[-1][0] > _VOID):
            times = race([self._dense, pruned, self._dense], PAIRS, self._backend.device)
            found.append((abs(median(times[:, 2]) / median(times[:, 0]) - 1), times))
        return min(found, key=lambda pair: pair[0])[1]

    def _run_of(self, model: nn.Module) -> Callable[[], Any]:
        with quiet_run(model):
            return self._backend.prepare(model, *self._inputs)


def hasten(
    graph: CouplingGraph,
    budget: Budget,
    table: LatencyTable,
    choose: Select,
    compare: Callable[[Mask], tuple[float, float]],
) -> Timed:
    """The choice whose measured time is the requested one.

    Parameters
    ----------
    graph, budget, table
        The latency bound is met by the clock, the others are as ever.
    choose
        Solves for a graph and bounds by the names of its costs.
    compare
        Nanoseconds of the dense model, and the ratio of the pruned to it, for units that stay.

    Raises
    ------
    BudgetError
        If the floors stop it, or if no plan comes within 5 % of the requested time: then other
        processes disturb the clock, or what is left gets no faster.

    Notes
    -----
    The time of an operator is no polynomial of its widths, so the table is replaced by one that is
    exact at the present widths; the solution is looked up in the table, and the polynomial made
    anew half-way there, until both agree.  Then the pruned model is measured in turn with the dense
    one, and the target moved by what the table was wrong.
    """
    prediction = table.predict(graph)
    others = {} if budget.counted is None else budget.counted.limits(graph)
    wanted = _share(budget, table.dense_ns)
    target, widths = wanted, prediction.full.astype(np.float64)
    met, missed = 1.0, 0.0  # by the table: the least target that was met, the most that was not
    best: Timed | None = None
    floors: BudgetError | None = None
    count = 0
    for _ in range(_CORRECTIONS):
        if target <= missed:  # the table may be too high down there
            if met - missed <= _SETTLED:
                break
            target = (met + missed) / 2
        try:
            chosen, widths = _solve(graph, others, prediction, target, widths, choose)
        except BudgetError as error:
            floors, missed = error, max(missed, target)
            continue
        met, count = min(met, target), count + 1
        dense_ns, ratio = compare(chosen.kept)
        wanted = _share(budget, dense_ns)
        predicted = prediction.time(prediction.widths(chosen.kept)) / table.dense_ns
        found = Timed(chosen._replace(bound=None), dense_ns, ratio * dense_ns, predicted, count)
        if best is None or abs(ratio - wanted) < abs(best.ratio - wanted):
            best = found
        slack = bool(others) and predicted < target * (1 - TOLERANCE)
        if abs(ratio / wanted - 1) <= TOLERANCE or (
            ratio < wanted and (slack or chosen.kept.all())
        ):
            return found
        # On a line through the dense model, about which table and clock agree.
        slope = (1 - predicted) / (1 - ratio) if ratio < 1 and predicted < 1 else 1.0
        aim = 1 - (1 - wanted) * slope
        off = target - predicted  # as the linearised problem will again
        target = min(1.0, max(aim + off, target / 2))
    if best is not None and abs(best.ratio / wanted - 1) <= _LAST_RESORT:
        return replace(best, measurements=count)
    nearest = f"the nearest of {count} took {best.ratio:.1%} by the clock" if best else ""
    raise _unreachable(wanted, table, nearest, floors) from floors


def _unreachable(
    wanted: float, table: LatencyTable, nearest: str, floors: BudgetError | None
) -> BudgetError:
    why = [nearest] if nearest else []
    if floors is not None:
        why.append(f"in picoseconds by the latency table: {floors.what}; {floors.why}")
    return BudgetError(
        f"no plan takes {wanted:.1%} of the dense model's {table.dense_ns / 1e6:.4g} ms",
        why="; ".join(why),
        fix="ask for another time, lower the floors, or measure while nothing else runs",
    )


def _solve(
    graph: CouplingGraph,
    others: Mapping[str, int],
    prediction: Prediction,
    target: float,
    widths: NDArray[np.float64],
    choose: Select,
) -> tuple[Selection, NDArray[np.float64]]:
    """The units that stay for a time by the table, and the widths that they leave."""
    goal = target * prediction.table.dense_ns
    for _ in range(_SOLUTIONS):
        polynomial = prediction.polynomial(widths)
        linear = replace(
            graph,
            width_labels=prediction.labels,
            costs={**graph.costs, "latency": polynomial},
        )
        dense = linear.cost("latency")
        most = round(goal * PICOSECONDS)
        most = dense if most > dense * (1 - _ROUNDED) else most
        chosen = choose(linear, {**others, "latency": most})
        found = prediction.widths(chosen.kept).astype(np.float64)
        off = polynomial(found.astype(np.int64)) / PICOSECONDS / prediction.time(found) - 1
        if abs(off) <= _SETTLED:
            break
        widths = widths ** (1 - _TRUST) * found**_TRUST
    return chosen, found


def _share(budget: Budget, dense_ns: float) -> float:
    """The bound as a part of the dense model's time."""
    bound = budget.latency
    if isinstance(bound, str):
        return min(1.0, picoseconds(bound) / PICOSECONDS / dense_ns)
    assert bound is not None
    return float(bound)
