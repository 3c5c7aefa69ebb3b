"""A choice under the bounds that retains much of the importance, and what no choice exceeds.

The units of least importance per saving are removed first, and what still fits is put back.  Then
one chain after the other is disturbed, and the rest repaired; what is better is kept.

The upper bound: every cost counts cells, positions of one dim times positions of the next.  A cell
is saved once, whoever takes it, so what is saved in all is at most the sum of what each chain saves
alone from the dense model.  With that sum in place of the cost, chains are independent.  A price
per cost then turns the choice under several bounds into one choice per chain, the prefix that loses
least when what it saves is paid for (Everett, 1963), and the least sum over all prices, of the
*dual* function, is what the bounds allow at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from prunus.planner.cost import CostState
from prunus.planner.removal import TOLERANCE, Removal
from prunus.planner.steps import Quanta

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_COARSE = 2_000
"""Up to so many quanta a single one matters, so that chains are disturbed one after the other."""

_MANY = 64
"""Beyond so many chains only one quantum of each is tried."""

_FEW = 8
"""Up to so many chains are disturbed two at a time as well."""

_ROUNDS = 2
"""How often all chains are."""

_SWEEPS = 4
"""How often every price is set anew with the others held."""

_HALVINGS = 40
"""Steps for one price."""


def solve(removal: Removal, quanta: Quanta) -> float | None:
    """Choose the quanta to remove; what is fixed stays removed.

    Returns
    -------
    float | None
        No choice within the bounds loses a smaller sum of scores; None where that can't be said.

    Raises
    ------
    BudgetError
        If the floors don't allow the bounds.
    """
    lost = least_loss(removal, quanta.scores)
    removal.descend()
    if removal.limits and len(quanta.scores) <= _COARSE:
        _improve(removal, quanta.rounded)
    return lost


def _improve(removal: Removal, rounded: bool) -> None:
    """Disturb one chain after the other, repair, and keep what is better.

    A result that uses the bounds up to their tolerance is better than one that does not (where
    widths are rounded, up to twice and four times that), and then one that retains more.
    """
    rooms = (TOLERANCE, *((2 * TOLERANCE, 4 * TOLERANCE) if rounded else ()))

    def lack() -> tuple[int, float]:
        slack = removal.slack()
        return sum(slack > room for room in rooms), -removal.retained

    best, least = removal.counts.copy(), lack()
    for _ in range(_ROUNDS):
        before = least
        for moves in _disturbances(len(removal.chains)):
            if removal.disturb(moves) and lack() < least:
                best, least = removal.counts.copy(), lack()
            else:
                removal.adopt(best)
        if least == before:
            break


def _disturbances(chains: int) -> Iterator[dict[int, int]]:
    """How many quanta are removed more, or less, of one chain, and of two where there are few."""
    steps = (1, -1) if chains > _MANY else (1, -1, 2, -2)
    far = (3, -3, 4, -4) if chains <= _FEW else ()
    yield from ({n: more} for n in range(chains) for more in (*steps, *far))
    if chains <= _FEW:
        for n, m in combinations(range(chains), 2):
            yield from ({n: a, m: b} for a in steps for b in steps)


def least_loss(removal: Removal, scores: Floats) -> float | None:
    """No choice of quanta within the limits loses less than this sum of scores.

    None where a cost has a term that falls when widths grow: what is said above does not hold then.

    Parameters
    ----------
    removal
        What may be removed, while nothing is but what is fixed.
    scores
        Of every quantum.
    """
    state, fixed = removal.state, removal.fixed
    gone = float(scores[fixed].sum())
    if not removal.chains or not removal.limits:
        return gone
    if any((constants < 0).any() for constants in state.constants):
        return None
    lost, cost = [], []
    for chain in removal.chains:
        for part in _alike(state, chain, scores):
            curve, possible = state.curve(int(part[0]), len(part))
            usable = np.ones_like(possible) if fixed.any() else possible
            own = np.concatenate([[0.0], np.cumsum(scores[part])])
            lost.append(np.where(usable, own, np.inf))
            cost.append(curve)
    room = np.array(removal.limits, dtype=np.float64) - np.array(state.costs, dtype=np.float64)
    return gone + max(0.0, -_Dual(lost, cost, room).least())


def _alike(state: CostState, chain: Ints, scores: Floats) -> list[Ints]:
    """Parts of a chain in which every quantum saves as much as any other, by ascending score.

    Of such a part the first ones are the best choice, however many are removed.
    """
    kinds = state.likeness(chain)
    order = np.lexsort((np.arange(len(chain)), scores[chain], kinds))
    ids, kinds = chain[order], kinds[order]
    return np.split(ids, np.flatnonzero(np.diff(kinds)) + 1)


class _Dual:
    """The dual function of curves: what each prefix loses, and by how much each cost changes.

    Parameters
    ----------
    lost
        One array per curve, one entry per prefix; infinite for a prefix that can't be.
    cost
        Of shape ``(costs, prefixes)``.
    room
        How much each cost may grow; negative where it has to shrink.
    """

    def __init__(self, lost: Sequence[Floats], cost: Sequence[Floats], room: Floats) -> None:
        self._lost, self._cost, self._room = np.concatenate(lost), np.concatenate(cost, 1), room
        self._start = np.cumsum([0, *(len(own) for own in lost[:-1])])

    def at(self, prices: Floats, index: int = 0) -> tuple[float, float]:
        """The dual at these prices, and by how much a bound is exceeded there."""
        value = -self._lost - prices @ self._cost
        best = np.maximum.reduceat(value, self._start)
        lengths = np.diff([*self._start, len(value)])
        # The shortest of the best prefixes.
        among = np.flatnonzero(value == np.repeat(best, lengths))
        first = among[np.searchsorted(among, self._start)]
        excess = self._cost[index, first].sum() - self._room[index]
        return float(best.sum() + prices @ self._room), float(excess)

    def least(self) -> float:
        """The least dual that is found, one price after the other; any prices give a bound."""
        prices = np.zeros(len(self._room))
        least = self.at(prices)[0]
        for _ in range(_SWEEPS if len(prices) > 1 else 1):
            for index in range(len(prices)):
                found, prices[index] = self._minimize(prices, index)
                least = min(least, found)
        return least

    def _minimize(self, prices: Floats, index: int) -> tuple[float, float]:
        """The least dual over one price, and that price: where its bound begins to hold.

        The dual is convex, and its slope is the excess with the sign changed.
        """

        def at(price: float) -> tuple[float, float]:
            return self.at(np.where(np.arange(len(prices)) == index, price, prices), index)

        low, high, least = 0.0, self._first_price(index), at(0.0)[0]
        if at(low)[1] <= 0:
            return least, low
        for _ in range(_HALVINGS):
            value, excess = at(high)
            least = min(least, value)
            if excess <= 0:
                break
            low, high = high, 4 * high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            value, excess = at(middle)
            least = min(least, value)
            low, high = (middle, high) if excess > 0 else (low, middle)
        return least, high

    def _first_price(self, index: int) -> float:
        """What a cost is worth if all that can be lost pays for all that can be saved."""
        lost = float(self._lost[np.isfinite(self._lost)].max())
        saved = float(-self._cost[index].min())
        return lost / saved if lost > 0 and saved > 0 else 1.0
