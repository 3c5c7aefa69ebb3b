"""Chains: units in the order in which they leave, those together that locksteps tie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np
from networkx.utils import UnionFind
from numpy.typing import NDArray

from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Lockstep

Ints = NDArray[np.int64]
Scores = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Chain:
    """Units that leave in this order.

    Attributes
    ----------
    rows
        Shape ``(length, members)``: the units of a row go together, the least important first.
    total
        How many units compete here, those that never go included.
    """

    rows: Ints
    total: int


@dataclass(frozen=True, eq=False)
class Tie:
    """Disjoint sets that lose units together: at each step ``rates[i]`` from set ``i``.

    ``conflict`` says why none may lose any.
    """

    sets: tuple[Ints, ...]
    rates: tuple[int, ...]
    conflict: str = ""


def form_chains(
    graph: CouplingGraph, scores: Scores, untouched: dict[str, str]
) -> tuple[list[Chain], list[str]]:
    """A chain per tie of locksteps, and one per group for the rest of its units.

    Groups that contradictory locksteps hold are added to ``untouched``, with the reason; what they
    say is returned along.
    """
    ties = merge_locksteps([c for c in graph.constraints if isinstance(c, Lockstep)])
    conflicts = _hold_contradicting(graph, ties, untouched)
    free, tied = np.zeros((2, graph.unit_count + 1), dtype=np.bool_)
    for group in graph.groups:
        free[group.units] = group.name not in untouched and np.isfinite(scores[group.units])
    chains = []
    for tie in ties:
        tied[np.concatenate(tie.sets)] = True
        chains.append(_chain_of_tie(tie, free, scores))
    for group in graph.groups:
        own = group.units[~tied[group.units]]
        chains.append(Chain(_ascending(own[free[own]], scores)[:, None], len(own)))
    return [chain for chain in chains if chain.rows.size], conflicts


def _hold_contradicting(
    graph: CouplingGraph, ties: Iterable[Tie], untouched: dict[str, str]
) -> list[str]:
    conflicts = []
    for tie in (tie for tie in ties if tie.conflict):
        units = np.concatenate(tie.sets)
        names = [group.name for group in graph.groups if np.isin(group.units, units).any()]
        untouched.update(dict.fromkeys(names, f"locksteps contradict: {tie.conflict}"))
        conflicts.append(f"{', '.join(names)} ({tie.conflict})")
    return conflicts


def _chain_of_tie(tie: Tie, free: Mask, scores: Scores) -> Chain:
    rows = [_ascending(units[free[units]], scores) for units in tie.sets]
    length = min(len(row) // rate for row, rate in zip(rows, tie.rates, strict=True))
    parts = [
        row[: length * rate].reshape(length, rate)
        for row, rate in zip(rows, tie.rates, strict=True)
    ]
    return Chain(np.concatenate(parts, axis=1), sum(len(units) for units in tie.sets))


def _ascending(units: Ints, scores: Scores) -> Ints:
    return units[np.argsort(scores[units], kind="stable")]


def merge_locksteps(locksteps: Sequence[Lockstep]) -> tuple[Tie, ...]:
    """Ties that imply all the locksteps.

    Locksteps that share a set are one.  Where one's sets are unions of another's, the finer sets
    decide (a group norm in front of a grouped convolution).  Locksteps that overlap in any other
    way contradict each other, and their units are kept.

    >>> pairs = Lockstep("balanced", (np.array([1, 2]), np.array([3, 4])), "group norm")
    >>> halves = Lockstep("equal count", (np.array([1, 2, 3, 4]), np.array([5, 6, 7, 8])), "n")
    >>> across = Lockstep("balanced", (np.array([2, 3]), np.array([1, 4])), "convolution")
    >>> merge_locksteps([pairs])[0].rates
    (1, 1)
    >>> merge_locksteps([pairs, halves])[0].rates
    (1, 1, 2)
    >>> merge_locksteps([pairs, across])[0].conflict
    'group norm; convolution'
    >>> wide = Lockstep("equal count", (np.array([1, 2, 3, 4]), np.array([5, 6])), "n", (2, 1))
    >>> merge_locksteps([pairs, wide])[0].rates
    (1, 1, 1)
    """
    sets, members = _distinct(locksteps)
    overlaps = _overlaps(sets)
    component = UnionFind(range(len(sets)))
    for linked in [*overlaps, *members]:
        component.union(*linked)
    uneven = {component[a] for a, _ in overlaps}
    together: dict[int, list[int]] = {}
    for n, found in enumerate(members):
        root = component[next(iter(found))]
        together.setdefault(root, []).append(n)
        uneven |= {root} if locksteps[n].rates else set()
    return tuple(
        _tie(sets, [members[n] for n in own], root in uneven, [locksteps[n].reason for n in own])
        for root, own in together.items()
    )


def _tie(
    sets: Sequence[Ints], members: Sequence[Mapping[int, int]], uneven: bool, reasons: Sequence[str]
) -> Tie:
    """What locksteps imply that share sets or units."""
    rates: dict[int, int] | None = {s: 1 for found in members for s in found}
    units = np.unique(np.concatenate([sets[s] for s in rates or ()]))
    if uneven:
        rates = _finest(sets, members)
    if rates is None:
        return Tie((units,), (1,), "; ".join(dict.fromkeys(reasons)))
    return Tie(tuple(sets[s] for s in rates), tuple(rates.values()))


def _distinct(locksteps: Sequence[Lockstep]) -> tuple[list[Ints], list[dict[int, int]]]:
    """The different sets, without units that are always kept; each lockstep's, with their rates."""
    ids: dict[bytes, int] = {}
    sets: list[Ints] = []
    members: list[dict[int, int]] = []
    for lockstep in locksteps:
        found: dict[int, int] = {}
        rates = lockstep.rates or (1,) * len(lockstep.sets)
        for units, rate in zip(lockstep.sets, rates, strict=True):
            units = units[units > 0]
            number = ids.setdefault(np.sort(units).tobytes(), len(sets))
            if number == len(sets):
                sets.append(units)
            found[number] = rate
        members.append(found)
    return sets, members


def _overlaps(sets: Sequence[Ints]) -> list[tuple[int, int]]:
    """Pairs of different sets that share a unit; enough of them to connect all that do."""
    if not sets:
        return []
    home = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    unit, home = np.unique(np.stack([np.concatenate(sets), home], axis=1), axis=0).T
    same = unit[1:] == unit[:-1]
    linked = np.unique(np.stack([home[:-1][same], home[1:][same]], axis=1), axis=0)
    return [(int(a), int(b)) for a, b in linked]


def _finest(sets: Sequence[Ints], members: Sequence[Mapping[int, int]]) -> dict[int, int] | None:
    """The sets of which all others are unions, with their rates; None if there are none such."""
    ids = sorted({s for found in members for s in found}, key=lambda s: (len(sets[s]), s))
    home: dict[int, int] = {}
    parts: dict[int, list[int]] = {}
    for s in ids:
        units = set(sets[s].tolist())
        inside = sorted({home[unit] for unit in units & home.keys()})
        if not inside:
            parts[s] = [s]
            home.update(dict.fromkeys(units, s))
        elif sum(len(sets[part]) for part in inside) == len(units) == len(units & home.keys()):
            parts[s] = inside
        else:
            return None
    return _rates(parts, members)


def _rates(
    parts: Mapping[int, list[int]], members: Sequence[Mapping[int, int]]
) -> dict[int, int] | None:
    """The least rates of the finest sets with which locksteps lose in proportion, if there are."""
    rates = {s: 1 for s, own in parts.items() if own == [s]}
    for _ in parts:
        before = dict(rates)
        for found in members:
            _raise(rates, found, parts)
        if rates == before:
            return rates
    return None


def _raise(rates: dict[int, int], found: Mapping[int, int], parts: Mapping[int, list[int]]) -> None:
    """Raise the rates of parts until the sets of a lockstep lose in its proportion."""
    steps = {s: Fraction(sum(rates[part] for part in parts[s]), rate) for s, rate in found.items()}
    most = Fraction(lcm(*(n.numerator for n in steps.values())),
                    gcd(*(n.denominator for n in steps.values())))  # fmt: skip
    for s, step in steps.items():
        for part in parts[s]:
            rates[part] = max(rates[part], int(rates[part] * most / step))
