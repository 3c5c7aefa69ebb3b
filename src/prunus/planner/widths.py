"""The plan of widths: scores, what a budget decides where nobody does, and a solver's choice.

Kernels take multiples of 8 channels at a time: what a budget of MACs saves is not saved by the
clock where widths are none.  So the widths of channels and FFNs are multiples of 8 unless somebody
says otherwise.  But the bound comes first: where a step of 8 is too coarse to meet it as closely as
any rounding does, the groups of which it is are rounded to less.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from prunus.errors import BudgetError, PlanError
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Lockstep, Preferred
from prunus.graph.plans import Plan
from prunus.graph.polynomial import PEAK
from prunus.graph.program import state_of
from prunus.importance import score
from prunus.importance.registry import is_comparable
from prunus.importance.torch_pruning import adapt
from prunus.planner.allocate import Selection, select
from prunus.planner.culprits import nothing_removed
from prunus.planner.filters import spread, taken_through
from prunus.planner.latency import MULTIPLES, meet_time
from prunus.planner.option_values import Scope, check_share
from prunus.planner.options import PlanOptions, ScoreOptions
from prunus.planner.rounding import Default, RoundTo, wide_groups
from prunus.planner.structure_ratios import GLOBAL_RATIO, check_counts, structure_ratios
from prunus.structures import find_structures
from prunus.structures.amounts import Asked, units_asked
from prunus.surgeon.attributes import find_edits
from prunus.tracer.trace import uncollected
from prunus.verifier.other_ways import follow_other_ways

MULTIPLE = 8
"""Of which widths are multiples unless somebody says otherwise."""

TOLERANCE = 0.02
"""How far under its bound a cost may lie for the sake of that, as a part of the dense one."""

AT_ONCE = 4
"""How many moments of a forward are bounded at most in one go."""

_ROUNDED = ("channels", "ffn", "hidden", "other")
"""Kinds of groups whose widths are rounded unless somebody says otherwise."""

_STUCK = "it can't be cut to multiples"

_SHAPING = ("scope", "normalise", "min_width", "max_ratio", "include", "exclude")
"""Options that shape what a budget takes."""

Scores = NDArray[np.float64]
Limits = Mapping[str, int]
"""The largest values of costs, by name."""


_PATTERNS = ("include", "exclude", "ratios", "min_width", "max_ratio")


def plan_widths(
    graph: CouplingGraph,
    model: nn.Module,
    asked: PlanOptions,
    hold: Mapping[str, str],
    *,
    limits: Limits | None = None,
    dropped: Collection[str] = (),
    may_remove_nothing: bool = False,
) -> Plan:
    """The plan of widths; see :func:`prunus.plan`.

    Parameters
    ----------
    asked
        With the statistics that the importance reads.
    hold
        Groups that are kept whole with the reason why each is, in place of ``asked.hold``.
    limits
        What is left of the budget of a model with all its blocks.
    dropped
        Blocks that the graph is without.
    may_remove_nothing
        Whether ratios too small to remove anything are taken for a request to remove nothing.
    """
    asked = replace(asked, importance=adapt(asked.importance, model), hold=tuple(hold))
    counted = asked.budget and asked.budget.counted
    if limits is None:
        limits = counted.limits(graph) if counted else {}
    scores = score_units(graph, model, asked)
    for name in hold:
        scores[graph.group(name).units] = np.inf
    scope = asked.scope
    patterns = {name: getattr(asked, name) for name in _PATTERNS}
    wanted = units_asked(graph, asked.remove or {}, dropped)
    if asked.remove:
        taken = structure_ratios(graph, model, scores, asked, hold, wanted)
        rest: Scope = "global" if asked.scope == "measured" else asked.scope
        asked = replace(asked, ratios={**(asked.ratios or {}), **taken}, scope=rest)
    request = _settle(graph, scores, asked, hold, _shares(wanted))
    found, searched = request.meet(model, limits)
    check_counts(graph, wanted, found.kept)
    _refuse_unnamed(graph, asked, found.kept)
    if found.kept.all() and not may_remove_nothing:
        _refuse_nothing(graph, scores, asked, {**found.stopped, **hold})
    through = taken_through(graph, patterns)
    searched |= {"through": through} if through else {}
    searched["scope"] = scope
    origin = {**request.record(found), **searched, "traced": graph.traced}
    chosen = plan_of_mask(graph, model, found.kept, origin)
    parts = {c: (graph.cost(c), graph.cost(c, found.kept)) for c in limits}
    chosen = replace(chosen, costs={**parts, **chosen.costs})
    return follow_other_ways(chosen, graph, model, found.kept)


def _shares(wanted: Mapping[str, Mapping[str, Asked]]) -> set[str]:
    """Groups of which a share is to be removed, not a count."""
    return {name for groups in wanted.values() for name, one in groups.items() if not one.counted}


def plan_of_mask(
    graph: CouplingGraph, model: nn.Module, kept: Mask, origin: Mapping[str, Any]
) -> Plan:
    """The plan that keeps a mask's units, with the attributes that follow."""
    chosen = Plan.from_mask(graph, kept, origin=origin)
    return replace(chosen, edits=find_edits(model, graph, kept))


def score_units(graph: CouplingGraph, model: nn.Module, asked: ScoreOptions) -> Scores:
    """A score per unit, shape ``(unit_count + 1,)``."""
    with uncollected():
        tensors, _ = state_of(model)
        return score(graph, tensors, asked.importance, seed=asked.seed, statistics=asked.statistics)


def _settle(
    graph: CouplingGraph,
    scores: Scores,
    asked: PlanOptions,
    hold: Mapping[str, str],
    shares: Collection[str],
) -> _Request:
    """The options with what a budget decides where nobody does.

    ``shares``: groups that lose a share of a structure, and may be rounded all the same.
    """
    given = spread(graph, asked.ratios or {}, "ratios", check_share)
    everywhere, rounded = asked.scope == "global", None
    capped = asked.max_ratio is None and asked.budget is not None and everywhere
    if asked.max_ratio is None:
        free = {"*": GLOBAL_RATIO, **dict.fromkeys(given, 1.0)} if given else GLOBAL_RATIO
        asked = replace(asked, max_ratio=free if capped else 1.0)
    if asked.round_to is None:
        rounded = _to_round(graph, asked, {*given, *hold}, shares)
        asked = replace(asked, round_to=1)
    options = {name: getattr(asked, name) for name in _SHAPING} | {"held": hold}
    if asked.normalise is None:
        # Scores that are comparable as they are share a global budget out without normalising.
        curves = everywhere and is_comparable(asked.importance)
        options["normalise"] = "none" if curves else "mean"
    open_ratios = {name: share for name, share in given.items() if name not in hold}
    options["ratios"] = asked.ratio if asked.ratios is None else open_ratios
    return _Request(graph, scores, asked, options, rounded, capped)


def _to_round(
    graph: CouplingGraph, asked: PlanOptions, others: Set[str], shares: Collection[str]
) -> list[str] | None:
    """Groups whose widths are rounded since nobody said otherwise; None where nothing asks for it.

    ``others`` are held, or have a ratio of their own, which a share of a structure is not.
    """
    preferred = _preferred(graph)
    if asked.budget is None and not preferred:
        return None
    return _rounded_by_default(graph, others - (preferred.keys() & set(shares)))


def _rounded_by_default(graph: CouplingGraph, others: Collection[str]) -> list[str]:
    """Groups whose widths are rounded unless somebody says otherwise."""
    kinds = {one.group: one.kind for one in find_structures(graph).structures}
    return [name for name, kind in kinds.items() if kind in _ROUNDED and name not in others]


@dataclass(frozen=True)
class _Request:
    """What is asked of the solver.

    Attributes
    ----------
    asked, options
        What the plan records, and what the solver is told.
    rounded
        Names of the groups whose widths are rounded since nobody said otherwise; None where
        ``asked.round_to`` decides.
    capped
        Whether groups lose at most :data:`GLOBAL_RATIO` since nobody said otherwise.
    """

    graph: CouplingGraph
    scores: Scores
    asked: PlanOptions
    options: Mapping[str, Any]
    rounded: Collection[str] | None
    capped: bool

    def select(self, limits: Limits, round_to: RoundTo) -> Selection:
        """The units that are kept with such widths."""
        fixed = {**self.options, "round_to": round_to}
        with uncollected():
            if self.asked.ratio is not None:
                return Selection(select(self.graph, self.scores, {}, **fixed).kept)
            return _hold_peak(
                self.graph, limits, lambda graph, most: select(graph, self.scores, most, **fixed)
            )

    def meet(self, model: nn.Module, limits: Limits) -> tuple[Selection, dict[str, Any]]:
        """The units that are kept, and what the plan records of a search for them."""
        budget = self.asked.budget
        with self.naming_floor():
            if budget is None or budget.latency is None:
                return self.choose(limits), {}
            found, record = self.meet_time(model, limits)
            return found, {"latency": record}

    def choose(self, limits: Limits) -> Selection:
        """The units that are kept."""
        if self.rounded is None:
            return self.select(limits, self.asked.round_to or 1)
        names = wide_groups(self.graph, self.rounded)
        return choose_rounded(self.graph, limits, names, lambda each: self.select(limits, each))

    def meet_time(self, model: nn.Module, limits: Limits) -> tuple[Selection, dict[str, Any]]:
        """The units that are kept for a budget of latency, and what the plan records of it."""
        graph, asked, rounded = self.graph, self.asked, self.rounded
        fixed = {group.name: 1 for group in graph.groups if group.name not in (rounded or ())}

        def choose(limits: Limits, multiple: int | None) -> Selection:
            if multiple is None:
                return self.select(limits, asked.round_to or 1)
            return self.select(limits, {"*": multiple, **fixed})

        found, record = meet_time(
            *(graph, model, asked, limits, choose),
            lambda kept: plan_of_mask(graph, model, kept, {"traced": graph.traced}),
            (None,) if rounded is None else MULTIPLES,
        )
        names = wide_groups(graph, rounded or ())
        # The bound on what is retained was that of the MACs, and says nothing of the time.
        found = found._replace(bound=None, rounded=dict.fromkeys(names, record["multiple"]))
        return found, record

    @contextmanager
    def naming_floor(self) -> Iterator[None]:
        """Let a budget's refusal say of a floor that nobody asked for how to lift it."""
        try:
            yield
        except BudgetError as error:
            if not self.capped:
                raise
            raise BudgetError(
                error.what,
                where=error.where,
                why=error.why,
                fix=f"{error.fix}; scope='global' takes at most {GLOBAL_RATIO:g} of a group "
                "unless you say otherwise: max_ratio=1.0 lifts that floor",
            ) from error

    def record(self, found: Selection) -> dict[str, Any]:
        """What the plan says of its options, those included that nobody gave."""
        decided = self.asked.record()
        automatic = ["max_ratio"] if self.capped else []
        if self.rounded is not None:
            automatic.append("round_to")
            most = max(found.rounded.values(), default=1)
            names = wide_groups(self.graph, self.rounded)
            finer = {n: found.rounded.get(n, 1) for n in names if found.rounded.get(n, 1) < most}
            decided["round_to"] = {"*": most, **finer} if finer else most
        held = dict.fromkeys(sorted(self.options["held"]), "it is held")
        decided |= {"stopped": {**found.stopped, **held}}
        decided |= {"retained": found.retained, "bound": found.bound}
        return {**decided, "automatic": automatic} if automatic else decided


def _refuse_unnamed(graph: CouplingGraph, asked: PlanOptions, kept: Mask) -> None:
    """Refuse ratios with which something shrinks, as in a config's proportions, that is unnamed."""
    if asked.budget is not None or asked.ratio is not None:
        return
    named = spread(graph, asked.ratios or {}, "ratios", check_share)
    for tie in (one for one in graph.constraints if isinstance(one, Lockstep) and one.rates):
        units = np.concatenate(tie.sets)
        tied = [group.name for group in graph.groups if np.isin(group.units, units).any()]
        others = [name for name in tied if name not in named]
        if others and not kept[units].all():
            raise PlanError(
                "what is named can't be removed alone",
                where=f"group {others[0]}",
                why=f"{tie.reason}; this one would shrink as well",
                fix="name all of them, with the same amount, or give a budget",
            )


def _refuse_nothing(
    graph: CouplingGraph, scores: Scores, asked: PlanOptions, reasons: Mapping[str, str]
) -> None:
    """Refuse a ratio that removes nothing; a budget that removes nothing is met as it is."""
    said = [] if asked.ratio is None else [f"ratio={asked.ratio:g}"]
    if any(share > 0 for share in (asked.ratios or {}).values()):
        said.append(f"ratios={dict(asked.ratios or {})}")
    if said:
        infinite = [g.name for g in graph.groups if not np.isfinite(scores[g.units]).any()]
        found = {**dict.fromkeys(infinite, "its scores are infinite"), **reasons}
        raise nothing_removed(graph, " and ".join(said), found)


def _hold_peak(
    graph: CouplingGraph,
    limits: Limits,
    choose: Callable[[CouplingGraph, Limits], Selection],
) -> Selection:
    """Choose what is kept under bounds of which one may be on the most that is alive at a moment.

    That most is no polynomial, but the bytes of every moment are one.  So the worst moments are
    bounded like any cost, and as long as others are above the bound then, these as well.
    """
    if PEAK not in limits:
        return choose(graph, limits)
    moments = graph.moments
    named = {f"{PEAK} at {name}": polynomial for name, polynomial in moments.bytes.items()}
    graph = replace(graph, width_labels=moments.labels, costs={**graph.costs, **named})
    bounds = {name: limit for name, limit in limits.items() if name != PEAK}
    found = choose(graph, bounds) if bounds else Selection(graph.all_kept)
    while True:
        values = {f"{PEAK} at {name}": v for name, v in moments.values(found.kept).items()}
        worst = sorted(
            [name for name in values if name not in bounds], key=lambda name: -values[name]
        )
        above = [name for name in worst[:AT_ONCE] if values[name] > limits[PEAK]]
        if not above:
            return found
        bounds |= dict.fromkeys(above, limits[PEAK])
        found = choose(graph, bounds)


def choose_rounded(
    graph: CouplingGraph,
    limits: Limits,
    names: Collection[str],
    choose: Callable[[Default], Selection],
) -> Selection:
    """The choice of units with widths as coarse as the bounds allow.

    Parameters
    ----------
    names, choose
        Groups that are rounded; what chooses under the bounds with multiples.

    Raises
    ------
    BudgetError
        If the floors don't allow the budget, rounded or not.
    """
    best: tuple[float, Selection] | None = None
    for multiples in _attempts(graph, limits, names):
        try:
            found = _without_stuck(multiples, choose)
        except BudgetError:
            if not multiples:
                raise
            continue
        spare = 0.0 if found.kept.all() else _spare(graph, limits, found.kept)
        if best is None or spare < best[0]:
            best = spare, found
        if spare <= TOLERANCE:
            break
    assert best is not None, "the last attempt raises or finds"
    return best[1]


def _without_stuck(
    multiples: Mapping[str, int], choose: Callable[[Default], Selection]
) -> Selection:
    """A choice in which no group is kept whole since it can't be cut to its multiple.

    (Six blocks of eight channels make no multiple of 8 in fewer blocks; but one of 4.)
    """
    while True:
        found = choose(Default(multiples))
        stuck = {n for n, why in found.stopped.items() if n in multiples and _STUCK in why}
        if not stuck:
            return found._replace(rounded=multiples)
        finer = {name: n // 2 if name in stuck else n for name, n in multiples.items()}
        multiples = {name: n for name, n in finer.items() if n > 1}


def _attempts(
    graph: CouplingGraph, limits: Limits, names: Collection[str]
) -> Iterator[Mapping[str, int]]:
    """Multiples of all groups; finer and finer ones where a step is too coarse; none."""
    preferred = _preferred(graph)
    finest = {name: 1 if name in preferred else _finest(graph, limits, name) for name in names}
    multiple, tried = max(preferred.values(), default=MULTIPLE), dict[str, int]()
    while multiple > 1:
        wanted = {name: min(multiple, preferred.get(name, MULTIPLE)) for name in names}
        found = {name: max(wanted[name], least) for name, least in finest.items()}
        if found and found != tried:
            yield found
        multiple, tried = multiple // 2, found
    yield {name: least for name, least in finest.items() if least > 1}
    if any(least > 1 for least in finest.values()):
        yield {}


def _preferred(graph: CouplingGraph) -> dict[str, int]:
    return {one.group: one.multiple for one in graph.constraints if isinstance(one, Preferred)}


def _finest(graph: CouplingGraph, limits: Limits, name: str) -> int:
    """The largest multiple, a power of two, of which a step costs no more than the tolerance."""
    units = graph.group(name).units
    multiple = MULTIPLE
    while multiple > 1:
        kept = graph.all_kept
        kept[units[:multiple]] = False
        saved = (1 - graph.cost(cost, kept) / max(graph.cost(cost), 1) for cost in limits)
        if max(saved, default=0.0) <= TOLERANCE:
            break
        multiple //= 2
    return multiple


def _spare(graph: CouplingGraph, limits: Limits, kept: Mask) -> float:
    """Room under the tightest bound, as a part of the dense cost."""
    rooms = (
        (most - graph.cost(name, kept)) / max(graph.cost(name), 1) for name, most in limits.items()
    )
    return min(rooms, default=0.0)
