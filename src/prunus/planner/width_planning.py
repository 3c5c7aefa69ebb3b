"""From scores and a budget to the plan of what stays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from prunus.calibration.batches import Batches
from prunus.errors import BudgetError
from prunus.graph.axis import Mask
from prunus.graph.budget import Budget
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.program import state_of
from prunus.importance import Statistics, collect, needs_of, score
from prunus.importance.registry import is_comparable
from prunus.importance.torch_pruning import adapt
from prunus.planner.activation_memory import hold_peak
from prunus.planner.alignment import RoundTo, wide_groups
from prunus.planner.allocate import Selection, select
from prunus.planner.culprits import nothing_removed
from prunus.planner.default_rounding import choose_rounded
from prunus.planner.filters import spread
from prunus.planner.latency import MULTIPLES, meet_time
from prunus.planner.option_values import check_share
from prunus.planner.options import PlanOptions
from prunus.planner.structure_ratios import GLOBAL_RATIO, check_counts, structure_ratios
from prunus.structures import find_structures
from prunus.surgeon.attributes import find_edits
from prunus.tracer.trace import uncollected
from prunus.verifier.other_ways import follow_other_ways

_ROUNDED = ("channels", "ffn", "hidden", "other")
"""Kinds of groups whose widths are rounded unless somebody says otherwise."""

_SHAPING = ("scope", "normalise", "min_width", "max_ratio", "include", "exclude")
"""Options that shape what a budget takes."""


def plan_widths(
    graph: CouplingGraph,
    model: nn.Module,
    asked: PlanOptions,
    *,
    limits: Mapping[str, int] | None = None,
    hold: Mapping[str, str] | None = None,
    dropped: Collection[str] = (),
    may_remove_nothing: bool = False,
) -> Plan:
    """The plan of widths; see :func:`prunus.plan`.

    Parameters
    ----------
    limits
        In place of a budget: the largest values of costs, by name.
    hold
        Groups that are kept whole with the reason why each is, in place of ``asked.hold``.
    dropped
        Blocks that the graph is without.
    may_remove_nothing
        Whether ratios too small to remove anything are taken for a request to remove nothing.
    """
    hold = dict.fromkeys(asked.hold, "it is held") if hold is None else hold
    asked = replace(asked, importance=adapt(asked.importance, model), hold=tuple(hold))
    ratio = asked.ratio
    budget: Budget | Mapping[str, int] | None = asked.budget if limits is None else limits
    by_clock = isinstance(budget, Budget) and budget.latency is not None and ratio is None
    if by_clock and asked.data is not None:
        asked = replace(asked, data=Batches(asked.data, asked.samples))
    asked = replace(asked, statistics=_collected(graph, model, asked))
    scores = _scored(graph, model, asked)
    if asked.remove:
        taken = structure_ratios(graph, scores, asked, hold, dropped)
        asked = replace(asked, ratios={**(asked.ratios or {}), **taken})
    settled, automatic = _set_automatic(graph, asked, budget, hold)
    recorded = settled.record()
    settled = _with_normalise(settled)

    def choose(
        bounds: Budget | Mapping[str, int] | None, round_to: RoundTo | None = None
    ) -> Selection:
        if round_to is not None or "round_to" not in automatic:
            multiples = round_to or settled.round_to or 1
            return _choose(graph, scores, bounds, settled, hold, multiples)
        most = bounds.limits(graph) if isinstance(bounds, Budget) else bounds or {}
        return choose_rounded(
            *(graph, most, automatic["round_to"]),
            lambda each: _choose(graph, scores, bounds, settled, hold, each),
        )

    searched: dict[str, Any] = {}
    with _naming_floor(automatic):
        if by_clock:
            assert isinstance(budget, Budget)
            rounded = _rounded_by(graph, asked, hold)
            found, searched["latency"] = meet_time(
                *(graph, model, budget),
                lambda bounds, multiple: choose(bounds, rounded(multiple)),
                lambda kept: plan_of_mask(graph, model, kept, {"traced": graph.traced}),
                multiples=MULTIPLES if "round_to" in automatic else (None,),
                data=asked.data,
                statistics=asked.statistics,
                seed=asked.seed,
            )
            multiple = searched["latency"]["multiple"]
            names = automatic.get("round_to", ())
            # The bound on what is retained was that of the MACs, and says nothing of the time.
            found = found._replace(bound=None, rounded=dict.fromkeys(names, multiple))
        else:
            found = choose(budget)
    check_counts(graph, asked, found.kept, dropped)
    if found.kept.all() and not may_remove_nothing:
        _refuse_nothing(graph, scores, ratio, asked.ratios, {**found.stopped, **hold})
    origin = {
        **recorded,
        **_automatic_record(automatic, found),
        **searched,
        "stopped": {**found.stopped, **dict.fromkeys(sorted(hold), "it is held")},
        **{name: getattr(found, name) for name in ("retained", "bound")},
        "traced": graph.traced,
    }
    chosen = plan_of_mask(graph, model, found.kept, origin)
    chosen = replace(chosen, costs=_bounded_costs(graph, chosen, budget, found.kept))
    return follow_other_ways(chosen, graph, model, found.kept)


def _collected(graph: CouplingGraph, model: nn.Module, asked: PlanOptions) -> Statistics | None:
    """What the importance reads of calibration data, collected where it is not given."""
    needs = needs_of(asked.importance)
    if asked.statistics is not None or asked.data is None or not needs:
        return asked.statistics
    return collect(
        *(model, graph, asked.data, needs), loss=asked.loss, seed=asked.seed, samples=asked.samples
    )


def _with_normalise(asked: PlanOptions) -> PlanOptions:
    """Scores that are comparable as they are share a global budget out without normalising."""
    if asked.normalise is not None or asked.ratio is not None:
        return asked
    curves = asked.scope == "global" and is_comparable(asked.importance)
    return replace(asked, normalise="none" if curves else "mean")


def _scored(graph: CouplingGraph, model: nn.Module, asked: PlanOptions) -> NDArray[np.float64]:
    """A score per unit, infinite for those of the groups that are held."""
    with uncollected():
        tensors, _ = state_of(model)
        scores = score(
            graph, tensors, asked.importance, seed=asked.seed, statistics=asked.statistics
        )
        for name in asked.hold:
            scores[graph.group(name).units] = np.inf
    return scores


def _bounded_costs(
    graph: CouplingGraph, chosen: Plan, budget: Budget | Mapping[str, int] | None, kept: Mask
) -> dict[str, tuple[int, int]]:
    """The costs of a plan, and those of parts of the model that the budget bounds."""
    counted = budget.counted if isinstance(budget, Budget) else budget
    bounded = counted.limits(graph) if isinstance(counted, Budget) else counted or {}
    others = [name for name in bounded if name not in chosen.costs]
    return {**chosen.costs, **{name: (graph.cost(name), graph.cost(name, kept)) for name in others}}


def _set_automatic(
    graph: CouplingGraph,
    asked: PlanOptions,
    budget: Budget | Mapping[str, int] | None,
    hold: Collection[str],
) -> tuple[PlanOptions, dict[str, Any]]:
    """The options with what a budget decides where nothing is said, and what was decided.

    Returns
    -------
    PlanOptions, dict
        Of the dict ``"round_to"``: names of the groups whose widths are rounded; ``"max_ratio"``:
        the floor.
    """
    automatic: dict[str, Any] = {}
    shared = budget is not None and asked.ratio is None
    given = spread(graph, asked.ratios or {}, "ratios", check_share) if shared else {}
    if asked.max_ratio is None:
        most: float | Mapping[str, float] = 1.0
        if shared and asked.scope == "global":
            automatic["max_ratio"] = most = GLOBAL_RATIO
            if given:
                most = {"*": GLOBAL_RATIO, **dict.fromkeys(given, 1.0)}
        asked = replace(asked, max_ratio=most)
    if asked.round_to is None:
        asked = replace(asked, round_to=1)
        if shared:
            automatic["round_to"] = _to_round(graph, {*given, *hold})
    return asked, automatic


def _to_round(graph: CouplingGraph, others: Collection[str]) -> list[str]:
    """Groups whose widths are rounded unless somebody says otherwise."""
    kinds = {one.group: one.kind for one in find_structures(graph).structures}
    free = [name for name, kind in kinds.items() if kind in _ROUNDED and name not in others]
    return wide_groups(graph, free)


@contextmanager
def _naming_floor(automatic: Mapping[str, Any]) -> Iterator[None]:
    """Let a budget's refusal say of a floor that nobody asked for how to lift it."""
    try:
        yield
    except BudgetError as error:
        if "max_ratio" not in automatic:
            raise
        raise BudgetError(
            error.what,
            where=error.where,
            why=error.why,
            fix=f"{error.fix}; scope='global' takes at most {automatic['max_ratio']:g} of a group "
            "unless you say otherwise: max_ratio=1.0 lifts that floor",
        ) from error


def _automatic_record(automatic: Mapping[str, Any], found: Selection) -> dict[str, Any]:
    """What the plan says of the options that were not given."""
    if not automatic:
        return {}
    decided: dict[str, Any] = {"automatic": sorted(automatic)}
    if "round_to" in automatic:
        most = max(found.rounded.values(), default=1)
        each = {name: found.rounded.get(name, 1) for name in automatic["round_to"]}
        finer = {name: multiple for name, multiple in each.items() if multiple < most}
        decided["round_to"] = {"*": most, **finer} if finer else most
    return decided


def _refuse_nothing(
    graph: CouplingGraph,
    scores: NDArray[np.float64],
    ratio: float | None,
    ratios: Mapping[str, float] | None,
    reasons: Mapping[str, str],
) -> None:
    """Refuse a ratio that removes nothing; a budget that removes nothing is met as it is."""
    asked = [] if ratio is None else [f"ratio={ratio:g}"]
    if any(share > 0 for share in (ratios or {}).values()):
        asked.append(f"ratios={dict(ratios or {})}")
    if not asked:
        return
    found = {g.name: "its scores are infinite" for g in graph.groups
             if not np.isfinite(scores[g.units]).any()}  # fmt: skip
    raise nothing_removed(graph, " and ".join(asked), {**found, **reasons})


def _rounded_by(
    graph: CouplingGraph, asked: PlanOptions, hold: Collection[str]
) -> Callable[[int | None], RoundTo | None]:
    """From a multiple that the clock's search tries to ``round_to``, of what is rounded at all."""
    given = spread(graph, asked.ratios or {}, "ratios", check_share)
    kinds = {one.group: one.kind for one in find_structures(graph).structures}
    free = {n for n, kind in kinds.items() if kind in _ROUNDED and n not in {*given, *hold}}
    fixed = dict.fromkeys((group.name for group in graph.groups if group.name not in free), 1)
    return lambda multiple: None if multiple is None else {"*": multiple, **fixed}


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
    asked: PlanOptions,
    hold: Mapping[str, str],
    round_to: RoundTo,
) -> Selection:
    ratios: float | Mapping[str, float] | None = asked.ratios
    if asked.ratio is not None:
        options = {name: getattr(asked, name) for name in _SHAPING if name != "normalise"}
        options |= {"ratios": asked.ratio, "held": hold, "round_to": round_to}
        return Selection(select(graph, scores, {}, **options).kept)
    if ratios is not None:
        given = spread(graph, ratios, "ratios", check_share)
        ratios = {name: share for name, share in given.items() if name not in hold}
    options = {name: getattr(asked, name) for name in _SHAPING}
    most = budget.limits(graph) if isinstance(budget, Budget) else budget or {}
    with uncollected():
        return hold_peak(
            graph,
            most,
            lambda g, limits: select(
                g, scores, limits, ratios=ratios, held=hold, round_to=round_to, **options
            ),
        )
