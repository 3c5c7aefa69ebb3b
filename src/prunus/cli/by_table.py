"""``--sensitivity FILE``: what every group loses is read from a table of sensitivities."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from prunus.cli.bounds import budget_of

if TYPE_CHECKING:
    from torch import nn

    from prunus import CouplingGraph
    from prunus.importance import Statistics
    from prunus.planner.search import Sensitivity

_ALONE: dict[str, Any] = {
    "ratios": None,
    "drop": [],
    "latency": None,
    "scope": "local",
    "normalise": None,
    "round_to": None,
    "min_width": 1,
    "max_ratio": None,
}
"""Options that say how much every group loses, as the table does, with what they are by default."""


def check_alone(options: argparse.Namespace) -> None:
    """Refuse what contradicts a table, before minutes go into a model.

    Raises
    ------
    PlanError
        If another option says how much the groups lose.
    """
    from prunus.errors import PlanError

    if options.sensitivity is None:
        return
    given = [name for name, default in _ALONE.items() if getattr(options, name) != default]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise PlanError(
            f"{flags} can't be combined with --sensitivity",
            why="what every group loses is read from the table",
            fix="leave out one or the other; --include and --exclude choose rows of the table",
        )


def ratios_by_table(
    options: argparse.Namespace,
    graph: CouplingGraph,
    model: nn.Module,
    statistics: Statistics | None,
) -> dict[str, float]:
    """What every group of the table loses: what meets the budget; without one, what is tolerated.

    Raises
    ------
    FormatError
        If the file is no table.
    PlanError
        If it is another model's, or of another importance, or says nothing without a budget.
    BudgetError
        If its largest ratios don't meet the budget.
    """
    import prunus

    table = prunus.planner.search.Sensitivity.load(options.sensitivity)
    _check_importance(table, options)
    chosen = prunus.planner.search.plan_by_sensitivity(
        table,
        graph,
        model,
        budget_of(options),
        importance=options.importance,
        statistics=statistics,
        include=options.include,
        exclude=options.exclude,
        seed=options.seed,
    )
    rows = (choice for choice in chosen.groups if choice.name in table.sizes)
    return {choice.name: len(choice.removed) / choice.size for choice in rows}


def _check_importance(table: Sensitivity, options: argparse.Namespace) -> None:
    """Refuse a table that was measured when other units went first."""
    from prunus.errors import PlanError

    measured = table.origin.get("importance", options.importance)
    if measured != options.importance:
        raise PlanError(
            f"the table is of the importance {measured}, and this plan of {options.importance}",
            where=str(options.sensitivity),
            why="what the loss of units costs hangs on which of them go first",
            fix=f"--importance {measured}",
        )
