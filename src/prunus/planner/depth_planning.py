"""Plans that drop blocks: which ones go, and the widths of what is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from prunus.errors import BudgetError, PlanError
from prunus.graph.amounts import LAYERS
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plan_records import Renaming
from prunus.graph.plans import Plan
from prunus.importance import Statistics
from prunus.importance.influence import block_influence
from prunus.planner.options import PlanOptions
from prunus.planner.width_planning import plan_of_mask, plan_widths
from prunus.surgeon.depth import without_blocks
from prunus.tracer.inputs import rebuild_inputs
from prunus.tracer.trace import trace


def plan_depth(
    graph: CouplingGraph,
    model: nn.Module,
    names: Sequence[str],
    args: Any,
    kwargs: Mapping[str, Any],
    asked: PlanOptions,
) -> tuple[Plan, CouplingGraph]:
    """A plan that drops blocks and cuts what is left, and the graph of what is left.

    Fractions of the budget are fractions of the model with all of its blocks.
    """
    with without_blocks(model, names):
        left = trace(model, args, kwargs, outputs=list(graph.kept_outputs)) if names else graph
        chosen = plan_left(graph, left, model, names, asked)
    return chosen, left


def plan_left(
    graph: CouplingGraph,
    left: CouplingGraph,
    model: nn.Module,
    names: Sequence[str],
    asked: PlanOptions,
    *,
    hold: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of which ``left``, the graph of the model without its blocks, tells the widths."""
    budget = asked.budget
    if names and budget is not None and budget.latency is not None:
        raise PlanError(
            "a latency budget can't be combined with dropping blocks",
            why="the clock compares with the model that has all its blocks",
            fix="drop the blocks first (prunus.drop_layers), then plan what is left",
        )
    if not names:
        return plan_widths(left, model, asked, hold=hold)
    left = _scopes_of_original(left, names)
    limits = None if budget is None else _left_of(budget.limits(graph), left)
    widths = asked.ratio is not None or asked.ratios or {*(asked.remove or {})} - {LAYERS}
    if limits is None and not widths:
        chosen = plan_of_mask(left, model, left.all_kept, {"traced": left.traced})
    else:
        chosen = plan_widths(left, model, asked, limits=limits, hold=hold, dropped=names)
    costs = {name: (graph.cost(name), after) for name, (_, after) in chosen.costs.items()}
    origin = {**chosen.origin, "budget": None if budget is None else budget.requested}
    return replace(chosen, drops=tuple(names), costs=costs, origin=origin)


def _scopes_of_original(left: CouplingGraph, dropped: Sequence[str]) -> CouplingGraph:
    """The same graph, whose costs are found by the paths of the model with all its blocks."""
    renaming = Renaming(dropped)
    parts = {
        cost: {renaming.before(owner): part for owner, part in owners.items()}
        for cost, owners in left.parts.items()
    }
    return replace(left, parts=parts)


def _left_of(limits: Mapping[str, int], left: CouplingGraph) -> dict[str, int]:
    """The bounds of what is left; that of a scope which is gone holds."""
    found = {}
    for name, most in limits.items():
        with suppress(BudgetError):
            left.cost(name)
            found[name] = most
    return found


def refuse_statistics(statistics: Statistics | None) -> None:
    """Statistics of a model with all its blocks say nothing of it without some."""
    if statistics is not None:
        raise PlanError(
            "statistics can't be given where blocks are dropped",
            why="they were collected on the model that has these blocks",
            fix="give data=, and they are collected on what is left",
        )


def traced_inputs(graph: CouplingGraph, model: nn.Module, seed: int) -> Any:
    spec = graph.traced.get("inputs")
    if spec is None:
        raise PlanError(
            "there are no inputs to trace the model with once its blocks are dropped",
            why="those of its trace can't be described as plain data",
            fix="use prunus.shrink(model, args, drop=...), which has them",
        )
    return rebuild_inputs(spec, model, seed=seed)


def measure_influence(
    model: nn.Module, graph: CouplingGraph, data: Iterable[Any] | None, args: Any, kwargs: Any
) -> dict[str, float]:
    """The influence of every block, on calibration data or on one call of the forward."""
    if data is not None:
        return block_influence(model, graph, data)
    return block_influence(model, graph, [()], forward_fn=lambda m, _: m(*args, **kwargs))
