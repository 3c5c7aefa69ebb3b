"""What a schedule can be asked: options of a plan that hold from round to round."""

from __future__ import annotations

import math
from typing import Any

from prunus.errors import PlanError
from prunus.graph.coupling import CouplingGraph
from prunus.planner.filters import spread
from prunus.planner.option_values import check_count, check_ratio, is_real
from prunus.planner.options import PlanOptions
from prunus.planner.structure_ratios import GLOBAL_RATIO

_REFUSED = ("ratio", "ratios", "remove", "drop", "statistics")
"""Options of a plan that say how much is removed otherwise than by a budget, or of one model."""

_ROUNDING_ERROR = 1e-9


def refuse_options(asked: PlanOptions) -> None:
    """Refuse what a round of a schedule can't be asked."""
    given = [n for n in _REFUSED if getattr(asked, n) not in (None, ())]
    latency = asked.budget is not None and "latency" in asked.budget.requested
    if given or latency:
        raise PlanError(
            f"a Schedule takes no {given[0]}=" if given else "a Schedule takes no bound on latency",
            why="every round has a bound between the cost of the original model and the budget",
            fix="give budget=prunus.Budget(macs=0.5), say",
        )


def check_progress(progress: Any) -> None:
    """Refuse what can't be the part of a training that is done."""
    if not is_real(progress) or not 0 <= progress <= 1:
        raise PlanError(
            f"progress must be a number between 0 and 1, got {progress!r}",
            why="it is how much of the training is done",
            fix="give epoch / epochs, say",
        )


def check_span(span: Any) -> tuple[float, float]:
    pair = isinstance(span, (tuple, list)) and len(span) == 2 and all(map(is_real, span))
    if not pair or not 0 <= span[0] <= span[1] <= 1:
        raise PlanError(
            f"span={span!r} is no pair of progresses",
            why="it has the progress of the first and the last round, between 0 and 1",
            fix="give span=(0.0, 0.75), say",
        )
    return float(span[0]), float(span[1])


def floors_of(graph: CouplingGraph, asked: PlanOptions) -> dict[str, int]:
    """By group of the original model: how many units are kept at least.

    A part of the original, which is another part of what is left after a round.
    """
    most = asked.max_ratio
    if most is None:
        most = GLOBAL_RATIO if asked.scope == "global" else 1.0
    ratios = spread(graph, most, "max_ratio", check_ratio)
    widths = spread(graph, asked.min_width, "min_width", check_count)
    floors = {}
    for group in graph.groups:
        lost = math.floor(ratios.get(group.name, 1.0) * group.size + _ROUNDING_ERROR)
        floors[group.name] = max(1, widths.get(group.name, 1), group.size - lost)
    return floors
