"""Allocation: the units to remove so that the model lies just under its budget."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Real
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prunus.errors import PlanError
from prunus.graph.axis import Mask
from prunus.graph.budget import Budget
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import AtLeast, Divisible
from prunus.planner.divisible import Attempt, choose_divisible
from prunus.planner.filters import excluded_groups, first_fitting, spread
from prunus.planner.fixed_ratios import choose_fixed
from prunus.planner.option_values import (
    Globs,
    Normalise,
    Scope,
    check_count,
    check_ratio,
    check_scope,
    check_share,
)
from prunus.planner.removal import Floors, Removal
from prunus.planner.rounding import RoundTo
from prunus.planner.solve import solve
from prunus.planner.steps import Quanta, find_stops, form_quanta

Scores = NDArray[np.float64]

_ROUNDING_ERROR = 1e-9
"""So that 0.7 of 10 units is 7, whatever 0.7 * 10 is in floating point."""

_TOLD = 3
"""An option with more values than this is only counted by an error."""


class Selection(NamedTuple):
    """The units that are kept, and how good a choice that is.

    Attributes
    ----------
    kept
        Mask of units, shape ``(unit_count + 1,)``.
    stopped
        Why groups can lose no more.
    retained
        The normalised scores of the kept units, as a part of those of all units (infinite
        ones left out); None where they were not compared.
    bound
        No choice under the same budget retains more; None but in the global scope.
    rounded
        By names of groups: of what their widths are multiples without anybody asking for it.
    """

    kept: Mask
    stopped: Mapping[str, str] = {}
    retained: float | None = None
    bound: float | None = None
    rounded: Mapping[str, int] = {}


def select(
    graph: CouplingGraph,
    scores: Scores,
    budget: Budget | Mapping[str, int],
    *,
    scope: Scope = "global",
    normalise: Normalise = "mean",
    ratios: float | Mapping[str, float] | None = None,
    min_width: int | Mapping[str, int] = 1,
    max_ratio: float | Mapping[str, float] = 1.0,
    round_to: RoundTo = 1,
    include: Globs | None = None,
    exclude: Globs = (),
    held: Mapping[str, str] = MappingProxyType({}),
) -> Selection:
    """Choose the units that are kept.

    Parameters
    ----------
    graph, scores
        The graph, and a score per unit, shape ``(unit_count + 1,)``: none negative, and infinite
        for a unit that has to stay.
    budget
        Bounds, all of which will hold; or the largest values of costs by name, for any cost that
        the graph counts: ``{"macs": 10**9, "params in layer4": 10**6}``.
    scope
        Which units compete.  *global*: all, and what stays is worth as much as can be; *local*:
        every group loses the same ratio; *isomorphic*: groups with axes of the same shapes are
        ranked together, and every such class loses the same ratio.  Globs over groups and their
        tensors make the classes by hand: a group is in the class of the first glob that fits it,
        and groups that none fits are a class each.
    normalise
        How the scores of a group are made comparable with those of others: divided by their
        *mean*, *max* or *sum*; *standardised*: less their mean and divided by their deviation (An
        et al., 2024), all raised so that the least is zero; *lamp*: the square of each divided by
        the sum of the squares of those that are no less (Lee et al., 2021); or as they are.
    ratios
        By globs over groups and their tensors: the share of its units that a group loses, exactly
        (the nearest number that locksteps and rounding allow).  The budget takes nothing else of
        these groups.  One number, without limits: what every group loses, at least one of two
        units, and as nearly as locksteps and dims that must keep a position allow.
    min_width, max_ratio
        Floors: a group keeps so many units at least, and loses no larger part; one number, or
        numbers by globs.
    round_to
        Every dim of a contraction that is cut becomes a multiple of this; one number, or numbers
        by kind of layer and by globs: see :func:`~prunus.planner.rounding.aligned_labels`.  A
        group for which there is no such cut stays as it is.
    include, exclude
        Globs over the names of groups and of the tensors on their axes.
    held
        Names of groups that stay whole, with the reason.

    Raises
    ------
    BudgetError
        If the floors don't allow the budget; it says which, and how far one can get.
    PlanError
        If an option is out of range, a glob matches nothing, or ratios contradict floors,
        rounding or one another.

    Examples
    --------
    >>> from prunus.graph.axis import Axis, Role
    >>> from prunus.graph.groups import Group
    >>> from prunus.graph.polynomial import Monomial, Polynomial
    >>> axis, label = Axis("w", 0), np.arange(1, 5)[:, None]
    >>> graph = CouplingGraph(
    ...     shapes={"w": (4, 3)}, parameters=frozenset({"w"}), aliases={},
    ...     labels={axis: label}, roles={axis: Role.PRODUCER},
    ...     groups=(Group("w[0]", np.arange(1, 5), ((axis, Role.PRODUCER),), False),),
    ...     unit_count=4, constraints=(), width_labels=(label,),
    ...     costs={"params": Polynomial(0, (Monomial(3, (0,)),))},
    ...     couplings=(), pins=(), kept_outputs=(), unknown={},
    ... )
    >>> select(graph, np.array([np.inf, 3.0, 1.0, 2.0, 4.0]), Budget(params=0.5)).kept
    array([ True,  True, False, False,  True])

    Notes
    -----
    Takes O(units · log groups) steps.  A step costs a look-up, and the evaluation of the
    monomials of one group when a width has changed on which that group's savings depend.
    """
    check_scope(scope, normalise)
    limits = budget.limits(graph) if isinstance(budget, Budget) else dict(budget)
    graph = replace(graph, costs={name: graph.polynomial(name) for name in limits})
    exactly = ratios is None or isinstance(ratios, Mapping)
    if not exactly:  # order is all that counts, so scores may be negative
        scores = scores - min(0.0, scores[np.isfinite(scores)].min(initial=0.0))
    weights = normalised(graph, _checked(graph, scores), normalise)
    excluded = {**excluded_groups(graph, include, exclude), **held}
    quanta = form_quanta(graph, weights, excluded, round_to)
    if quanta.conflicts:
        warnings.warn(
            f"locksteps contradict each other, so these groups stay as they are: "
            f"{'; '.join(quanta.conflicts)}",
            stacklevel=2,
        )
    said = {"min_width": min_width, "max_ratio": max_ratio, "round_to": round_to, "ratios": ratios}
    floors = _floors(graph, min_width, max_ratio, said)
    ranks = _ranks(graph, quanta, scope)
    given = {} if ratios is None else spread(graph, ratios, "ratios", check_share)
    taken, settled = choose_fixed(graph, quanta, given, exactly=exactly)

    def attempt(counts: Mapping[int, int]) -> Attempt:
        """Plan with so many quanta of some chains removed, whatever ratios say of them."""
        other = set().union(*(quanta.chains[n].tolist() for n in counts))
        fixed = [q for n, count in counts.items() for q in quanta.chains[n][:count].tolist()]
        removal = Removal(graph, quanta, limits, floors, ranks)
        if settled or counts:
            left = [quantum for quantum in taken if quantum not in other]
            removal.settle([*left, *fixed], settled.union(counts), exactly=exactly)
        if scope == "global":
            return Attempt(removal, solve(removal, quanta))
        removal.descend()
        return Attempt(removal, None)

    given_of = settled if limits else range(len(quanta.chains))  # without a bound all is said
    asked = {n: len(set(taken).intersection(quanta.chains[n].tolist())) for n in given_of}
    removal, lost = choose_divisible(
        [rule for rule in graph.constraints if isinstance(rule, Divisible)],
        *(quanta, attempt, asked if exactly else {}),
        by_score=scope == "global",
    )
    kept = quanta.kept(removal.removed)
    known = np.isfinite(weights)
    total = float(weights[known].sum()) or 1.0
    return Selection(
        kept=kept,
        stopped=find_stops(graph, quanta, removal.removed, floors.units),
        retained=float(weights[known & kept].sum()) / total,
        bound=None if lost is None else 1 - lost / total,
    )


def _floors(
    graph: CouplingGraph,
    min_width: int | Mapping[str, int],
    max_ratio: float | Mapping[str, float],
    said: Mapping[str, Any],
) -> Floors:
    """How many units every group keeps at least; ``said`` is what stops the descent, for people."""
    widths = spread(graph, min_width, "min_width", check_count)
    most = spread(graph, max_ratio, "max_ratio", check_ratio)
    counted = [c for c in graph.constraints if isinstance(c, AtLeast) and c.least > 1]
    enough = _enough(graph, counted)
    units = []
    for group in graph.groups:
        lost = math.floor(most.get(group.name, 1.0) * group.size + _ROUNDING_ERROR)
        least = max(widths.get(group.name, 1), group.size - lost)
        units.append(max(least, enough.get(group.name, 1)))
    texts = [_tell(name, value) for name, value in said.items() if value is not None]
    texts += [f"at least {c.least} for {c.reason}" for c in counted[:1]]
    return Floors(tuple(units), ", ".join(texts))


def _enough(graph: CouplingGraph, counted: Iterable[AtLeast]) -> dict[str, int]:
    """By group: how many units the code counts on, as a router's top-k on so many experts.

    Where several groups share the dim, each keeps so many, or all that it has.
    """
    found: dict[str, int] = {}
    for constraint in counted:
        for group in graph.groups:
            if np.isin(constraint.label, group.units).any():
                least = min(constraint.least, group.size)
                found[group.name] = max(found.get(group.name, 1), least)
    return found


def _tell(option: str, value: Any) -> str:
    """An option for an error message."""
    if isinstance(value, Mapping) and len(value) > _TOLD:
        return f"{option} for {len(value)} groups"
    return f"{option}={value:g}" if isinstance(value, Real) else f"{option}={value}"


def _checked(graph: CouplingGraph, scores: Scores) -> Scores:
    found = np.asarray(scores, dtype=np.float64)
    if found.shape != (graph.unit_count + 1,):
        raise PlanError(
            f"scores have the shape {found.shape}",
            why=f"the graph has {graph.unit_count} units, and entry 0 is for what always stays",
            fix=f"give an array of shape ({graph.unit_count + 1},)",
        )
    for group in graph.groups:
        wrong = ~(found[group.units] >= 0)
        if wrong.any():
            raise PlanError(
                f"{int(wrong.sum())} scores of {group.size} are negative or NaN",
                where=f"group {group.name}",
                why="scores are divided by what a unit saves, so they need a zero",
                fix="subtract the group's least score, or take absolute values",
            )
    return found


def normalised(graph: CouplingGraph, scores: Scores, normalise: Normalise) -> Scores:
    """Scores that can be compared across groups; infinite ones stay so."""
    if normalise == "none":
        return scores
    weights = scores.copy()
    for group in graph.groups:
        own = scores[group.units]
        finite = np.isfinite(own)
        if finite.any():
            own[finite] = _comparable(own[finite], normalise)
        weights[group.units] = own
    if normalise == "standardised":
        grouped = np.isfinite(weights)
        grouped[0] = False
        weights[grouped] -= weights[grouped].min(initial=0.0)
    return weights


def _comparable(scores: Scores, normalise: Normalise) -> Scores:
    """Those of one group.

    >>> _comparable(np.array([3.0, 1.0, 2.0]), "lamp").round(4).tolist()
    [1.0, 0.0714, 0.3077]
    >>> _comparable(np.array([3.0, 1.0, 2.0]), "standardised").round(4).tolist()
    [1.2247, -1.2247, 0.0]
    """
    if normalise == "standardised":
        spread = float(scores.std())
        return np.asarray((scores - scores.mean()) / (spread if spread > 0 else 1.0))
    if normalise == "lamp":
        order = np.argsort(scores, kind="stable")
        squares = (scores[order] / (scores.max() or 1.0)) ** 2
        above = np.cumsum(squares[::-1])[::-1]
        found = np.zeros(len(scores))
        found[order] = np.divide(squares, above, out=np.zeros(len(scores)), where=above > 0)
        return found
    divisor = float(getattr(np, normalise)(scores))
    return scores / divisor if divisor > 0 else scores


def _ranks(graph: CouplingGraph, quanta: Quanta, scope: Scope) -> list[Scores] | None:
    """For every chain the ratio that is reached with each quantum; None where cost decides."""
    if scope == "global":
        return None
    ranks: list[Scores] = [np.zeros(0)] * len(quanta.chains)
    for members in _classes(graph, quanta, scope):
        chains = [quanta.chains[n] for n in members]
        means = [quanta.scores[c] / np.maximum(quanta.sizes[c], 1) for c in chains]
        worst = np.concatenate([np.maximum.accumulate(mean) for mean in means])
        order = np.argsort(worst, kind="stable")
        sizes = np.concatenate([quanta.sizes[c] for c in chains])
        reached = np.empty(len(order))
        reached[order] = np.cumsum(sizes[order]) / sum(quanta.totals[n] for n in members)
        bounds = np.cumsum([len(c) for c in chains])[:-1]
        for n, part in zip(members, np.split(reached, bounds), strict=True):
            ranks[n] = part
    return ranks


def _classes(graph: CouplingGraph, quanta: Quanta, scope: Scope) -> Iterable[list[int]]:
    """Numbers of the chains that compete with one another."""
    by_hand = {} if isinstance(scope, str) else first_fitting(graph, scope, "scope")
    classes: dict[object, list[int]] = {}
    for n, chain in enumerate(quanta.chains):
        groups = quanta.groups_of(chain)
        names = [graph.groups[g].name for g in groups]
        fitting = [by_hand[name] for name in names if name in by_hand]
        key: object = n
        if fitting:
            key = "by hand", min(fitting)
        elif scope == "isomorphic":
            key = tuple(sorted(_shape_of(graph, g) for g in groups))
        classes.setdefault(key, []).append(n)
    return classes.values()


def _shape_of(graph: CouplingGraph, number: int) -> tuple[tuple[str, tuple[int, ...], int], ...]:
    """What isomorphic groups have in common: roles, tensor shapes and dims of their axes."""
    axes = graph.groups[number].axes
    return tuple(sorted((role.value, graph.shapes[a.tensor], a.dim) for a, role in axes))
