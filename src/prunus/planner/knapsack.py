"""Steps by dynamic programming over the curves: the best prefixes under one bound.

What chains cost is counted in parts of the room, rounded up so that the bound holds for certain;
the best choice for every number of parts is built up chain by chain, as SPDY does with layers
(Frantar & Alistarh, 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Mask
from prunus.planner.curves import Curves
from prunus.planner.linearised import Choose

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_PARTS = 2000
"""Into which the room of a step is divided."""


def by_dynamic_programming(joint: Sequence[Sequence[int]], otherwise: Choose) -> Choose:
    """Steps by dynamic programming under one bound.

    Parameters
    ----------
    joint
        Chains that begin with the same quantum: all of them begin, or none; ``otherwise`` says
        which.
    otherwise
        How a step is chosen where the parts are too coarse for any choice.
    """

    def choose(curves: Curves, room: Floats, allowed: Mask, counts: Ints) -> Ints:
        assert len(room) == 1, "dynamic programming knows one bound"
        instead = otherwise(curves, room, allowed, counts)
        offered = allowed.copy()
        for n in (n for members in joint for n in members):
            first, following = curves.start[n], slice(curves.start[n] + 1, curves.start[n + 1])
            if instead[n]:
                offered[first] = False
            else:
                offered[following] = False
        found = best_prefixes(curves, float(room[0]), offered)
        return instead if found is None else found

    return choose


def best_prefixes(curves: Curves, room: float, allowed: Mask, parts: int = _PARTS) -> Ints | None:
    """Lengths of the prefixes, one of each chain, that lose least and cost at most ``room``.

    None where there is no such choice once costs are rounded up to whole parts of the room.

    >>> curves = Curves(
    ...     np.array([0, 3, 5]), np.array([0.0, 1, 5, 0, 3]),
    ...     np.array([[0.0, -4, -8, 0, -5]]), np.ones(5, dtype=bool),
    ... )
    >>> best_prefixes(curves, -8, curves.possible).tolist()
    [1, 1]
    """
    chains = len(curves.start) - 1
    offered = [
        np.flatnonzero(allowed[a:b])
        for a, b in zip(curves.start[:-1].tolist(), curves.start[1:].tolist(), strict=True)
    ]
    costs = [curves.cost[0, curves.start[n] + offered[n]] for n in range(chains)]
    least = np.array([float(own.min()) for own in costs])
    spare = room - float(least.sum())
    if spare < 0:
        return None
    taken = [_in_parts(own - own.min(), spare, parts) for own in costs]
    best = np.zeros(parts + 1)
    trail = []
    for n in range(chains):
        lost = curves.lost[curves.start[n] + offered[n]]
        best, place = _extend(best, lost, taken[n])
        trail.append(place)
    if not np.isfinite(best[-1]):
        return None
    counts = np.zeros(chains, dtype=np.int64)
    left = parts
    for n in reversed(range(chains)):
        taking = int(trail[n][left])
        counts[n] = offered[n][taking]
        left -= int(taken[n][taking])
    return counts


def _in_parts(costs: Floats, spare: float, parts: int) -> Ints:
    """Costs in whole parts, never too few; one more than there are for what can't be had."""
    if spare <= 0:
        return np.where(costs > 0, parts + 1, 0)
    return np.ceil(np.minimum(costs / spare * parts, parts + 1) - 1e-9).astype(np.int64)


def _extend(best: Floats, lost: Floats, taken: Ints) -> tuple[Floats, Ints]:
    """The least loss for every number of parts with one chain more, and by which prefix."""
    found = np.full(len(best), np.inf)
    place = np.zeros(len(best), dtype=np.int64)
    for n, (loss, cost) in enumerate(zip(lost.tolist(), taken.tolist(), strict=True)):
        if cost >= len(best):
            continue
        value = best[: len(best) - cost] + loss
        better = np.flatnonzero(value < found[cost:])
        found[cost + better], place[cost + better] = value[better], n
    return found, place
