"""A choice under the bounds that retains as much importance as can be, and what none exceeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prunus.errors import BudgetError
from prunus.graph.axis import Mask
from prunus.planner.bound import least_loss
from prunus.planner.curves import Curves, CurveSource
from prunus.planner.descent import Descent
from prunus.planner.lagrange import Pricing
from prunus.planner.linearised import Choose, descend
from prunus.planner.local_search import Windows
from prunus.planner.removal import TOLERANCE
from prunus.planner.steps import Quanta

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_SMALL = 20_000
"""Up to so many quanta the greedy descent is run as well, and every step is repaired."""

_COARSE = 2_000
"""Up to so many quanta a single one matters, so that what they exchange is enumerated."""

_WORTH = 0.99
"""A choice that uses the bound up to its tolerance and retains this is not improved upon."""


def solve(descent: Descent, quanta: Quanta) -> float | None:
    """Choose the quanta to remove; what is gone from the descent already stays gone.

    Returns
    -------
    float | None
        No choice within the bounds loses a smaller sum of scores (see
        :func:`~prunus.planner.bound.least_loss`); None where that can't be said.

    Raises
    ------
    BudgetError
        If the floors don't allow the bounds.
    """
    fixed = descent.removed.copy()
    gone = float(quanta.scores[fixed].sum())
    if not descent.chains or not descent.limits:
        descent.descend()
        return gone
    bound = least_loss(descent.state, descent.chains, quanta.scores, descent.limits, fixed)
    descent.adopt(fixed)
    _solve_in_steps(descent, quanta, fixed)
    return None if bound is None else gone + bound


def _solve_in_steps(descent: Descent, quanta: Quanta, fixed: Mask) -> None:
    """Steps, each repaired on exact costs; the best of them and of the greedy descent."""
    small = len(quanta.scores) <= _SMALL
    chains = descent.chains
    source = CurveSource(descent.state, chains, quanta.scores, fixed)
    left = _left(descent, chains)
    choose = _by_prices(len(descent.limits), _joint(quanta, chains))
    limits = np.array(descent.limits, dtype=np.float64)
    starts = [np.zeros(len(chains), dtype=np.int64)]
    found: list[tuple[float, Mask]] = []
    if small:
        descent.reduce()
        descent.fill()
        found.append((descent.retained, descent.removed.copy()))
        starts.append(np.array([int(descent.removed[chain].sum()) for chain in chains]))
    for start in starts:
        steps = descend(source, left, limits, start, choose)
        for counts in steps if small else steps[-1:]:
            if _repair(descent, source.mask(counts)):
                found.append((descent.retained, descent.removed.copy()))
    if not found:
        descent.adopt(fixed)
        descent.descend()
        return
    found.sort(key=lambda one: -one[0])
    _finish(descent, quanta, fixed, [removed for _, removed in found])


def _finish(descent: Descent, quanta: Quanta, fixed: Mask, found: Sequence[Mask]) -> None:
    """The best that is found from some choices, the most promising first.

    One that uses the bound up to its tolerance is taken, and the first of them that costs next to
    no importance; where there is none, the one that leaves least room.
    """
    coarse = len(quanta.scores) <= _COARSE
    descent.adopt(found[0])
    if coarse:
        descent.adopt(Windows(descent, quanta, fixed).improve())
    best, removed = descent.retained, descent.removed.copy()
    room = descent.slack()
    if room <= TOLERANCE:
        return
    close: list[tuple[float, float, Mask]] = [(room, -best, removed)]
    for start in [removed, *found]:
        descent.adopt(start)
        descent.exchange()
        if coarse and descent.slack() <= TOLERANCE:
            descent.adopt(Windows(descent, quanta, fixed, TOLERANCE).improve())
        room = max(descent.slack(), TOLERANCE)
        if room <= TOLERANCE and descent.retained >= _WORTH * best:
            return
        close.append((room, -descent.retained, descent.removed.copy()))
    descent.adopt(min(close, key=lambda one: one[:2])[2])


def _repair(descent: Descent, removed: Mask) -> bool:
    """Remove what is missing to the bounds, and put back what fits; False if that can't be done."""
    if not descent.adopt(removed):
        return False
    try:
        descent.reduce()
    except BudgetError:
        return False
    descent.fill()
    return True


def _by_prices(costs: int, joint: Sequence[Sequence[int]]) -> Choose:
    """Steps at the prices that meet the bounds; each search begins at the prices before."""
    prices = np.zeros(costs)

    def choose(curves: Curves, room: Floats, allowed: Mask, _: Ints) -> Ints:
        nonlocal prices
        priced = Pricing(curves, room, allowed, joint).solve(prices)
        prices = priced.prices
        return priced.counts

    return choose


def _joint(quanta: Quanta, chains: Sequence[Ints]) -> list[list[int]]:
    """Numbers of the chains that begin with the same gate."""
    members: dict[int, list[int]] = {}
    for n, chain in enumerate(chains):
        if int(chain[0]) in quanta.gates:
            members.setdefault(int(chain[0]), []).append(n)
    return [numbers for numbers in members.values() if len(numbers) > 1]


def _left(descent: Descent, chains: Sequence[Ints]) -> Floats:
    """Units that each prefix leaves of its chain's groups; 0 where that is below a floor."""
    parts = []
    for chain in chains:
        groups, taken = descent.units_taken(chain)
        spare = descent.spare[groups] - taken
        units = descent.left[groups].sum() - taken.sum(axis=1)
        parts.append(np.where((spare >= 0).all(axis=1), units, 0))
    return np.concatenate(parts).astype(np.float64)
