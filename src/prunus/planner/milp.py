"""Steps as mixed-integer programs: under several bounds the best prefixes at once (HiGHS).

Prices (:mod:`prunus.planner.lagrange`) find only choices that are best at *some* prices; between
these lie others, the more of them the more bounds there are.  A step is small, so that its program
is small: one of its prefixes for every chain, under one sum for every bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from prunus.graph.axis import Mask
from prunus.planner.curves import Curves
from prunus.planner.linearised import Choose

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_PREFIXES = 48
"""Of a chain that a program chooses from; evenly spread where more are allowed."""

_GAP = 1e-5
"""How far from the best the solution of a program may be."""

_NODES = 200
"""Of the search tree; a limit of time would not be the same on every machine."""


def by_programs(joint: Sequence[Sequence[int]], otherwise: Choose) -> Choose:
    """Steps by mixed-integer programs; by another way where a program has no solution.

    Parameters
    ----------
    joint
        Chains that begin with the same quantum: all of them begin, or none.
    """

    def choose(curves: Curves, room: Floats, allowed: Mask, counts: Ints) -> Ints:
        offered = _thinned(curves, allowed, counts)
        found = _solve(curves, room, offered, joint)
        return otherwise(curves, room, allowed, counts) if found is None else found

    return choose


def _thinned(curves: Curves, allowed: Mask, counts: Ints) -> Ints:
    """Where the prefixes stand that are offered: of each chain a few, the present one among them.

    >>> curves = Curves(np.array([0, 4]), np.zeros(4), np.zeros((1, 4)), np.ones(4, dtype=bool))
    >>> _thinned(curves, np.array([True, True, False, True]), np.array([1])).tolist()
    [0, 1, 3]
    """
    parts = []
    for n, present in enumerate(curves.at(counts).tolist()):
        own = np.flatnonzero(allowed[curves.start[n] : curves.start[n + 1]]) + curves.start[n]
        if len(own) > _PREFIXES:
            own = own[np.linspace(0, len(own) - 1, _PREFIXES).round().astype(np.int64)]
        parts.append(np.union1d(own, [present]))
    return np.concatenate(parts)


def _solve(
    curves: Curves, room: Floats, offered: Ints, joint: Sequence[Sequence[int]]
) -> Ints | None:
    """The lengths of the best prefixes; None where none of those offered meet the bounds."""
    chain = np.searchsorted(curves.start, offered, side="right") - 1
    each = np.arange(len(offered))
    chains = len(curves.start) - 1
    one = csr_array((np.ones(len(offered)), (chain, each)), shape=(chains, len(offered)))
    scale = np.maximum(np.abs(curves.cost).max(axis=1, initial=0.0), 1.0)
    costs = csr_array(curves.cost[:, offered] / scale[:, None])
    limits = [LinearConstraint(one, 1, 1), LinearConstraint(costs, -np.inf, room / scale)]
    whole = {int(chain[k]): int(k) for k in each if offered[k] == curves.start[chain[k]]}
    ties = [
        csr_array(([1.0, -1.0], ([0, 0], [whole[first], whole[n]])), shape=(1, len(offered)))
        for first, *others in joint
        for n in others
        if first in whole and n in whole
    ]
    if ties:
        limits.append(LinearConstraint(vstack(ties), 0, 0))
    lost = curves.lost[offered]
    solution = milp(
        lost / max(float(lost.max(initial=0.0)), 1e-300),
        integrality=np.ones(len(offered)),
        bounds=Bounds(0, 1),
        constraints=limits,
        options={"mip_rel_gap": _GAP, "node_limit": _NODES, "presolve": True},
    )
    if solution.x is None:
        return None
    chosen = each[solution.x > 0.5]
    counts = np.zeros(chains, dtype=np.int64)
    counts[chain[chosen]] = offered[chosen] - curves.start[chain[chosen]]
    return counts
