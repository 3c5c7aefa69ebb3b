"""What stays: from scores, a budget and blocks to drop to a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from prunus.budget import Budget
from prunus.drops import Renaming
from prunus.errors import BudgetError, PlanError
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.importance import Importance, Statistics, collect, name_of, needs_of, score
from prunus.importance.influence import block_influence
from prunus.importance.obs import exchange_all
from prunus.importance.registry import Context, check_statistics, is_comparable
from prunus.importance.targets import Loss
from prunus.integrations.torch_pruning import adapt
from prunus.latency import LatencyTable
from prunus.latency_planning import (
    Timed,
    Timekeeper,
    check_table,
    hasten,
    predict_time,
    resolve_rounding,
)
from prunus.planner import Selection, select, thin
from prunus.planner.alignment import RoundTo
from prunus.planner.allocate import Scope, check_share
from prunus.planner.filters import spread
from prunus.planner.layers import Drop, find_drops
from prunus.planner.peak import hold_peak
from prunus.planner.solvers import Solver
from prunus.plans import Plan
from prunus.surgeon.attributes import find_edits
from prunus.surgeon.depth import refuse_quantized, without_blocks
from prunus.tracer.entry import entered_by
from prunus.tracer.inputs import rebuild_inputs
from prunus.tracer.program import state_of
from prunus.tracer.trace import trace, uncollected

Globs = str | Sequence[str]


def plan(
    graph: CouplingGraph,
    model: nn.Module,
    *,
    budget: Budget | None = None,
    ratio: float | None = None,
    importance: str | Importance = "l2",
    data: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    loss: Loss | None = None,
    ratios: Mapping[str, float] | None = None,
    scope: Scope = "local",
    solver: Solver | None = None,
    min_width: int | Mapping[str, int] = 1,
    max_ratio: float | Mapping[str, float] = 1.0,
    round_to: RoundTo | Literal["latency"] = 1,
    include: Globs | None = None,
    exclude: Globs = (),
    hold: Collection[str] = (),
    drop: Drop = (),
    latency: LatencyTable | None = None,
    protect_ends: bool = True,
    exchange: bool = False,
    seed: int = 0,
) -> Plan:
    """Choose what stays: so that every cost of a budget is met from below, or by a ratio.

    Where blocks are dropped, they go first, and what is left meets the rest of the budget.

    Parameters
    ----------
    graph, model
        What :func:`prunus.trace` found, and the model whose weights are scored.
    budget
        Upper bounds on ``params``, ``macs``, ``bytes``, peak ``activation`` memory and
        ``latency``, as fractions of the dense cost or absolute, of the whole model and (but for
        memory and latency) of parts of it; several hold at once.  A bound on latency is met within
        2 % by the clock: plans are cut on a copy, measured in turn with the dense model, and made
        again.
    ratio
        In place of a budget: the share of units that every group loses, whatever that costs.
    ratios
        With a budget or alone: the share of its units that a group loses, exactly, by globs over
        groups and their tensors, ``{"layer3.*": 0.3}``.  (Exactly: the nearest number of units
        that locksteps and rounding allow.)  The budget takes nothing else of these groups.
    importance
        A name: of the weights alone ``"l1"``, ``"l2"``, ``"lamp"``, ``"fpgm"``, ``"bn_scale"``;
        of calibration data ``"taylor"``, ``"fisher"``, ``"head_gradient"``, ``"activation"``,
        ``"wanda"``, ``"flap"``, ``"obs"``, ``"confidence"``; the control ``"random"``.  Or a
        :class:`prunus.Movement`, an importance of Torch-Pruning, or a function of a group and a
        context.
    data, statistics
        Calibration batches for an importance that reads them, and for the influence of blocks
        (without them it is measured on random inputs of the traced shapes); or what
        :func:`prunus.collect` made of them for this graph, which may serve several plans.
    loss
        For gradients; see :func:`prunus.collect`.
    scope
        ``"local"`` (each group loses the same ratio), ``"isomorphic"`` (groups of one shape
        compete) or ``"global"`` (all groups compete by their scores over the mean of the group;
        by the scores themselves of ``"obs"``: then it is the curves of error versus width that
        share the budget out).
    solver
        How the best choice of the global scope is looked for: ``"lagrange"`` (the default: prices
        for costs, then repair and exchange on exact costs) or ``"greedy"``.  ``plan.origin`` says
        what part of all scores the plan ``"retained"``, and the ``"bound"`` that no choice of
        units exceeds.
    min_width, max_ratio
        Floors: units that every group keeps, and the largest ratio it may lose; one number, or
        numbers by globs.
    round_to
        Every pruned width becomes a multiple of this; one number, or numbers by kind of layer and
        by globs: ``{"linear": 32, "conv": 8, "head.*": 1, "*": 4}``.  A group narrower than twice
        the number is rounded to half of it, and so on, down to 16: 32 is for groups at least 64
        wide.  Where several globs fit a group, the most specific one decides.  ``"latency"``: the
        number at which the time of most contractions steps, by the latency table.
    include, exclude
        Globs over group names and tensor names.
    hold
        Names of groups that stay whole (where blocks are dropped: names in what is left).
    drop
        Blocks to drop: their module paths, or how many, those of least influence
        (:func:`prunus.block_influence`).  Then neither budget nor ratio is needed.
    protect_ends
        Whether the first and last block of every stack stay when ``drop`` is a number.
    latency
        What :func:`prunus.measure` found.  With a budget of latency ``plan.costs["latency_ns"]``
        and ``plan.origin["latency"]`` say what was measured, without one what the table predicts.
    exchange
        Whether units that went are exchanged for ones that stay, at the widths that were chosen,
        as long as that lowers the error of ``"obs"``, whose data it reads.

    Raises
    ------
    BudgetError
        If the floors stop it; the message says which, and what is reachable.  If a scope of the
        budget matches nothing.  If the clock does not agree with any plan.
    DataError
        If the importance needs calibration data and there is none.
    PlanError
        If blocks can't be dropped, the message says why; or if statistics are given along: they are
        those of the model with all its blocks.  If a glob matches no group, or a ratio contradicts
        a floor, the rounding or another ratio.
    """
    options: dict[str, Any] = {
        "budget": budget,
        "ratio": ratio,
        "ratios": ratios,
        "importance": importance,
        "loss": loss,
        "scope": scope,
        "solver": solver,
        "min_width": min_width,
        "max_ratio": max_ratio,
        "round_to": round_to,
        "include": include,
        "exclude": exclude,
        "hold": hold,
        "exchange": exchange,
        "seed": seed,
        "latency": latency,
    }
    if not isinstance(drop, int) and not drop:
        return _plan_widths(graph, model, data=data, statistics=statistics, **options)
    refuse_quantized(model)
    refuse_statistics(statistics)
    if isinstance(data, Iterator):
        data = list(data)  # it is read twice
    args, kwargs = _traced_inputs(graph, model, seed)
    with entered_by(model, graph.forward_fn):
        names = find_drops(
            graph, drop, lambda: measure_influence(model, graph, data, args, kwargs), protect_ends
        )
        return plan_depth(graph, model, names, args, kwargs, data=data, **options)[0]


def plan_depth(
    graph: CouplingGraph,
    model: nn.Module,
    names: Sequence[str],
    args: Any,
    kwargs: Mapping[str, Any],
    *,
    budget: Budget | None = None,
    ratio: float | None = None,
    **options: Any,
) -> tuple[Plan, CouplingGraph]:
    """A plan that drops blocks and cuts what is left, and the graph of what is left.

    Fractions of the budget are fractions of the model with all of its blocks.
    """
    with without_blocks(model, names):
        left = trace(model, args, kwargs, outputs=list(graph.kept_outputs)) if names else graph
        chosen = plan_left(graph, left, model, names, budget=budget, ratio=ratio, **options)
    return chosen, left


def plan_left(
    graph: CouplingGraph,
    left: CouplingGraph,
    model: nn.Module,
    names: Sequence[str],
    *,
    budget: Budget | None = None,
    ratio: float | None = None,
    **options: Any,
) -> Plan:
    """The plan of which ``left``, the graph of the model without its blocks, tells the widths."""
    if names and budget is not None and budget.latency is not None:
        raise PlanError(
            "a latency budget can't be combined with dropping blocks",
            why="the table is that of the model with all its blocks",
            fix="drop the blocks first (prunus.drop_layers), then measure and plan what is left",
        )
    if not names:
        return _plan_widths(left, model, budget=budget, ratio=ratio, **options)
    requested = None if budget is None else budget.requested
    left = _scopes_of_original(left, names)
    limits = None if budget is None else _left_of(budget.limits(graph), left)
    if limits is None and ratio is None and not options.get("ratios"):
        chosen = plan_of_mask(left, model, left.all_kept, {"traced": left.traced})
    else:
        chosen = _plan_widths(left, model, budget=limits, ratio=ratio, **options)
    costs = {name: (graph.cost(name), after) for name, (_, after) in chosen.costs.items()}
    origin = {**chosen.origin, "budget": requested}
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


def _traced_inputs(graph: CouplingGraph, model: nn.Module, seed: int) -> Any:
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


def _plan_widths(
    graph: CouplingGraph,
    model: nn.Module,
    *,
    budget: Budget | Mapping[str, int] | None = None,
    ratio: float | None = None,
    importance: str | Importance = "l2",
    data: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    loss: Loss | None = None,
    hold: Collection[str] = (),
    exchange: bool = False,
    seed: int = 0,
    latency: LatencyTable | None = None,
    **options: Any,
) -> Plan:
    importance = adapt(importance, model)
    check_table(budget, latency)
    needs = needs_to_plan(importance, exchange)
    if statistics is None and data is not None and needs:
        statistics = collect(model, graph, data, needs, loss=loss, seed=seed)
    options = {**_OPTIONS, **options}
    names = ("ratios", "scope", "min_width", "max_ratio", "round_to")
    said = {name: options[name] for name in names}
    if options["scope"] == "global" and is_comparable(importance):
        options["normalise"] = "none"
    options["round_to"] = resolve_rounding(options["round_to"], graph, latency)
    with uncollected():
        tensors, _ = state_of(model)
        scores = score(graph, tensors, importance, seed=seed, statistics=statistics)
        for name in hold:
            scores[graph.group(name).units] = np.inf
        if exchange:
            check_statistics(graph, "obs", statistics)

    def choose(one: CouplingGraph, bounds: Budget | Mapping[str, int] | None) -> Selection:
        return _choose(one, scores, bounds, ratio, hold, **options)

    timed: Timed | None = None
    if latency is not None and isinstance(budget, Budget) and budget.latency and ratio is None:
        timed = _keep_time(graph, model, budget, latency, choose, seed)
        found = timed.selection
    else:
        found = choose(graph, budget)
    if exchange:
        context = Context(graph, tensors, seed, collected=statistics)
        kept = exchange_all(graph, context, found.kept, scores)
        found = found._replace(kept=kept, retained=None, bound=None)  # worth is not the aim then
    if latency is not None and timed is None:
        timed = predict_time(graph, found, latency)
    origin = {
        "importance": name_of(importance),
        "budget": budget.requested if isinstance(budget, Budget) else budget,
        "ratio": ratio,
        **said,
        "hold": sorted(hold),
        **({"exchange": True} if exchange else {}),
        "stopped": {**found.stopped, **dict.fromkeys(sorted(hold), "it is held")},
        "seed": seed,
        **{name: getattr(found, name) for name in ("solver", "retained", "bound")},
        "traced": graph.traced,
    }
    chosen = plan_of_mask(graph, model, found.kept, origin)
    counted = budget.counted if isinstance(budget, Budget) else budget
    asked = counted.limits(graph) if isinstance(counted, Budget) else counted or {}
    parts = {n: (graph.cost(n), graph.cost(n, found.kept)) for n in asked if n not in chosen.costs}
    chosen = replace(chosen, costs={**chosen.costs, **parts})
    return chosen if latency is None or timed is None else timed.told_in(chosen, latency)


def _keep_time(
    graph: CouplingGraph,
    model: nn.Module,
    budget: Budget,
    table: LatencyTable,
    choose: Callable[..., Selection],
    seed: int,
) -> Timed:
    """The choice whose measured time is the requested one."""

    def compare(kept: Mask) -> tuple[float, float]:
        return keeper.compare(plan_of_mask(graph, model, kept, {"traced": graph.traced}))

    with entered_by(model, graph.forward_fn):
        keeper = Timekeeper(graph, model, table, seed)
        return hasten(graph, budget, table, choose, compare)


def needs_to_plan(importance: str | Importance, exchange: bool = False) -> frozenset[str]:
    """What :func:`plan` reads of calibration data with these options."""
    return needs_of(importance) | (needs_of("obs") if exchange else frozenset())


_OPTIONS: Mapping[str, Any] = {
    "ratios": None,
    "scope": "local",
    "solver": None,
    "min_width": 1,
    "max_ratio": 1.0,
    "round_to": 1,
    "include": None,
    "exclude": (),
}


def plan_of_mask(
    graph: CouplingGraph, model: nn.Module, kept: Mask, origin: Mapping[str, Any]
) -> Plan:
    """The plan that keeps a mask's units, with the attributes that follow."""
    chosen = Plan.from_mask(graph, kept, origin=origin)
    return replace(chosen, edits=find_edits(model, graph, kept))


def _choose(
    graph: CouplingGraph,
    scores: NDArray[np.float64],
    budget: Budget | Mapping[str, int] | None,
    ratio: float | None,
    hold: Collection[str],
    *,
    ratios: Mapping[str, float] | None,
    **options: Any,
) -> Selection:
    if ratios is not None:
        given = spread(graph, ratios, "ratios", check_share)
        ratios = {name: share for name, share in given.items() if name not in hold}
    if ratio is None and (budget is not None or ratios is not None):
        limits = budget.limits(graph) if isinstance(budget, Budget) else budget or {}
        with uncollected():
            return hold_peak(
                graph, limits, lambda g, most: select(g, scores, most, ratios=ratios, **options)
            )
    if ratio is not None and budget is None and ratios is None:
        _refuse_options(options)
        return Selection(thin(graph, scores, ratio))
    several = [n for n, v in {"a budget": budget, "ratios": ratios}.items() if v is not None]
    raise PlanError(
        f"{' and '.join(several)} and a ratio were given"
        if several
        else "nothing says how much to remove",
        why="a ratio is taken from every group, whatever it costs",
        fix="give budget=Budget(macs=0.5), say, or ratio=0.3, or ratios={'layer3.*': 0.3}",
    )


def _refuse_options(options: Mapping[str, Any]) -> None:
    """A ratio is a ratio of every group: what shapes a budget's choice has no say in it."""
    shaping = ("solver", "min_width", "max_ratio", "round_to", "include", "exclude")
    given = [name for name in shaping if options[name] != _OPTIONS[name]]
    if given:
        raise PlanError(
            f"{', '.join(given)} can't be combined with ratio=",
            why="a ratio is taken from every group alike",
            fix="give a budget instead",
        )
