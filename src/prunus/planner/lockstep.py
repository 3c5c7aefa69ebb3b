"""Locksteps laid together: which sets of units lose equally many, without contradiction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import gcd, lcm

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from prunus.graph.groups import Lockstep

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Tie:
    """Disjoint sets that lose units together: at each step ``rates[i]`` from set ``i``.

    ``conflict`` says why none may lose any.
    """

    sets: tuple[Ints, ...]
    rates: tuple[int, ...]
    conflict: str = ""


def merge_locksteps(locksteps: Sequence[Lockstep]) -> tuple[Tie, ...]:
    """Ties that imply all the locksteps.

    Locksteps that share a set are one.  Where one's sets are unions of another's, the finer sets
    decide (a group norm in front of a grouped convolution).  Locksteps that overlap in any other
    way contradict each other, and their units have to stay.

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
    if not sets:
        return ()
    overlaps = _overlaps(sets)
    links = [*overlaps, *((a, b) for found in members for a, b in pairwise(found))]
    component = _components(links, len(sets))
    locksteps_in: dict[int, list[int]] = {}
    for n, found in enumerate(members):
        locksteps_in.setdefault(int(component[next(iter(found))]), []).append(n)
    uneven = {int(component[a]) for a, _ in overlaps}
    uneven |= {index for index, own in locksteps_in.items() if any(locksteps[n].rates for n in own)}
    ties = []
    for index, own in locksteps_in.items():
        ids = list(dict.fromkeys(s for n in own for s in members[n]))
        rates: dict[int, int] | None = dict.fromkeys(ids, 1)
        if index in uneven:
            rates = _finest(sets, [members[n] for n in own])
        if rates is None:
            reasons = "; ".join(dict.fromkeys(locksteps[n].reason for n in own))
            ties.append(Tie((np.unique(np.concatenate([sets[s] for s in ids])),), (1,), reasons))
        else:
            ties.append(Tie(tuple(sets[s] for s in rates), tuple(rates.values())))
    return tuple(ties)


def _distinct(locksteps: Sequence[Lockstep]) -> tuple[list[Ints], list[dict[int, int]]]:
    """The different sets, without the units that always stay; each lockstep's, with their rates."""
    ids: dict[bytes, int] = {}
    sets: list[Ints] = []
    members: list[dict[int, int]] = []
    for lockstep in locksteps:
        found: dict[int, int] = {}
        rates = lockstep.rates or (1,) * len(lockstep.sets)
        for units, rate in zip(lockstep.sets, rates, strict=True):
            units = units[units > 0]
            key = np.sort(units).tobytes()
            if key not in ids:
                ids[key] = len(sets)
                sets.append(units)
            found[ids[key]] = rate
        members.append(found)
    return sets, members


def _overlaps(sets: Sequence[Ints]) -> list[tuple[int, int]]:
    """Pairs of different sets that share a unit; enough of them to connect all that do."""
    units = np.concatenate(sets)
    home = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    pairs = np.unique(np.stack([units, home], axis=1), axis=0)
    same = pairs[1:, 0] == pairs[:-1, 0]
    linked = np.unique(np.stack([pairs[:-1, 1][same], pairs[1:, 1][same]], axis=1), axis=0)
    return [(int(a), int(b)) for a, b in linked]


def _components(links: Sequence[tuple[int, int]], size: int) -> Ints:
    a, b = np.array(links, dtype=np.int64).reshape(-1, 2).T
    edges = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(size, size))
    return np.asarray(connected_components(edges, directed=False)[1], dtype=np.int64)


def _finest(sets: Sequence[Ints], members: Sequence[Mapping[int, int]]) -> dict[int, int] | None:
    """The sets of which all others are unions, with their rates; None if there are none such."""
    ids = sorted({s for found in members for s in found}, key=lambda s: (len(sets[s]), s))
    home: dict[int, int] = {}
    parts: dict[int, list[int]] = {}
    for s in ids:
        units = set(sets[s].tolist())
        inside = sorted({home[unit] for unit in units if unit in home})
        if not inside:
            parts[s] = [s]
            home.update(dict.fromkeys(units, s))
        elif sum(len(sets[part]) for part in inside) == len(units) == len(units & home.keys()):
            parts[s] = inside
        else:
            return None
    rates = {s: 1 for s in ids if parts[s] == [s]}
    for _ in range(len(ids)):
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
