"""What no choice of units exceeds: an upper bound on the importance that a budget leaves.

Every cost counts cells: positions of one dim times positions of the next.  A cell is saved once,
whoever takes it, so what is saved in all is at most the sum of what each chain saves alone from
the dense model.  With that sum in place of the cost, chains are independent.  A price per cost then
turns the choice under several bounds into one choice per chain, the prefix that loses least when
what it saves is paid for (Everett, 1963), and the least sum over all prices, of the *dual*
function, is what the bounds allow at most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Mask
from prunus.planner.cost import CostState

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_SWEEPS = 4
"""How often every price is set anew with the others held."""

_HALVINGS = 60
"""Steps for one price; each at least halves what is left of the dual's gap, or ends the search."""


def least_loss(
    state: CostState, chains: Sequence[Ints], scores: Floats, limits: Sequence[int], fixed: Mask
) -> float | None:
    """No choice of quanta within the limits loses less than this sum of scores.

    None where a cost has a term that falls when widths grow: what is said above does not hold then.

    Parameters
    ----------
    state
        Costs; it is left with exactly the quanta of ``fixed`` removed.
    chains
        Quanta that may be removed.
    scores
        Of every quantum.
    limits
        Of every cost.
    fixed
        Quanta that are removed in every choice.
    """
    if any((constants < 0).any() for constants in state.constants):
        return None
    state.assign(fixed)
    lost, cost = [], []
    for chain in chains:
        for part in _alike(state, chain, scores):
            curve, possible = state.curve(int(part[0]), len(part))
            usable = np.ones_like(possible) if fixed.any() else possible
            own = np.concatenate([[0.0], np.cumsum(scores[part])])
            lost.append(np.where(usable, own, np.inf))
            cost.append(curve)
    room = np.array(limits, dtype=np.float64) - np.array(state.costs, dtype=np.float64)
    return max(0.0, -_Dual(lost, cost, room).least())


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
        """The least dual that is found, one price after the other."""
        prices = np.zeros(len(self._room))
        least = self.at(prices)[0]
        for sweep in range(_SWEEPS if len(prices) > 1 else 1):
            before = prices.copy()
            for index in range(len(prices)):
                found, prices[index] = self._minimize(prices, index)
                least = min(least, found)
            if sweep and np.allclose(prices, before, rtol=1e-6, atol=0):
                break
        return least

    def _minimize(self, prices: Floats, index: int) -> tuple[float, float]:
        """The least dual over one price, and the least price at which its bound holds."""

        def at(price: float) -> tuple[float, float, float]:
            tried = prices.copy()
            tried[index] = price
            return *self.at(tried, index), price

        below, above = at(0.0), at(float(prices[index]) or self._first_price(index))
        least = min(below[0], above[0])
        for _ in range(_HALVINGS):
            if below[1] <= 0 or above[1] <= 0:
                break
            below, above = above, at(4 * above[2])
            least = min(least, above[0])
        for _ in range(_HALVINGS):
            # Where the tangents of the convex dual at both ends meet; its slope is -excess.
            drop = below[1] - above[1]
            if below[1] <= 0 or above[1] > 0 or drop <= 0:
                break
            crossing = below[0] - above[0] + below[1] * below[2] - above[1] * above[2]
            middle = at(crossing / drop)
            if not below[2] < middle[2] < above[2]:
                break
            least = min(least, middle[0])
            tangent = below[0] - below[1] * (middle[2] - below[2])
            if middle[1] <= 0:
                above = middle
            else:
                below = middle
            if middle[0] <= tangent + 1e-12 * max(1.0, abs(tangent)):
                break
        return least, below[2] if below[1] <= 0 else above[2]

    def _first_price(self, index: int) -> float:
        """What a cost is worth if all that can be lost pays for all that can be saved."""
        lost = float(self._lost[np.isfinite(self._lost)].max())
        saved = float(-self._cost[index].min())
        return lost / saved if lost > 0 and saved > 0 else 1.0
