"""Locksteps laid together: which sets of units lose equally many, without contradiction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    """
    sets, members = _distinct(locksteps)
    if not sets:
        return ()
    overlaps = _overlaps(sets)
    links = [*overlaps, *((found[0], other) for found in members for other in found[1:])]
    component = _components(links, len(sets))
    tangled = {int(component[a]) for a, _ in overlaps}
    locksteps_in: dict[int, list[int]] = {}
    for n, found in enumerate(members):
        locksteps_in.setdefault(int(component[found[0]]), []).append(n)
    ties = []
    for index, own in locksteps_in.items():
        ids = list(dict.fromkeys(s for n in own for s in members[n]))
        rates: dict[int, int] | None = dict.fromkeys(ids, 1)
        if index in tangled:
            rates = _finest(sets, [members[n] for n in own])
        if rates is None:
            reasons = "; ".join(dict.fromkeys(locksteps[n].reason for n in own))
            ties.append(Tie((np.unique(np.concatenate([sets[s] for s in ids])),), (1,), reasons))
        else:
            ties.append(Tie(tuple(sets[s] for s in rates), tuple(rates.values())))
    return tuple(ties)


def _distinct(locksteps: Sequence[Lockstep]) -> tuple[list[Ints], list[list[int]]]:
    """The different sets, without the units that always stay, and each lockstep's choice."""
    ids: dict[bytes, int] = {}
    sets: list[Ints] = []
    members: list[list[int]] = []
    for lockstep in locksteps:
        found: list[int] = []
        for units in lockstep.sets:
            units = units[units > 0]
            key = np.sort(units).tobytes()
            if key not in ids:
                ids[key] = len(sets)
                sets.append(units)
            if ids[key] not in found:
                found.append(ids[key])
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


def _finest(sets: Sequence[Ints], members: Sequence[Sequence[int]]) -> dict[int, int] | None:
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
        if not all(_raise(rates, found, parts) for found in members):
            return None
        if rates == before:
            return rates
    return None


def _raise(rates: dict[int, int], sets: Sequence[int], parts: Mapping[int, list[int]]) -> bool:
    """Raise the rates of parts until these sets lose equally many; False where they can't."""
    loss = {s: sum(rates[part] for part in parts[s]) for s in sets}
    most = max(loss.values())
    if any(most % lost for lost in loss.values()):
        return False
    for s, lost in loss.items():
        for part in parts[s]:
            rates[part] = max(rates[part], rates[part] * most // lost)
    return True
