"""Prices for costs: every chain keeps what is worth more than it costs (Everett 1963).

A price per cost turns the choice under several bounds into one choice per chain: the prefix that
loses least, when what it saves is paid for.  The least sum over all prices of the *dual* function
is what the bounds allow at most, and its prices are those of the solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Mask
from prunus.planner.curves import Curves

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_SWEEPS = 4
"""How often every price is set anew with the others held."""

_HALVINGS = 60
"""Steps for one price; each at least halves what is left of the dual's gap, or ends the search."""


@dataclass(frozen=True, eq=False)
class Priced:
    """Prefixes at some prices.

    Attributes
    ----------
    counts
        Lengths of the prefixes, one per chain.
    prices
        Score per unit of each cost.
    dual
        At these prices.
    """

    counts: Ints
    prices: Floats
    dual: float


class Pricing:
    """The dual function of curves.

    Parameters
    ----------
    curves
        What each prefix loses and saves.
    room
        How much each cost may grow; negative where it has to shrink.
    allowed
        Which prefixes may be chosen; at least one of every chain.
    joint
        Chains that begin with the same quantum: all of them begin, or none.

    Attributes
    ----------
    least
        The least dual seen: no choice within the bounds loses less than ``-least``.
    """

    def __init__(
        self, curves: Curves, room: Floats, allowed: Mask, joint: Sequence[Sequence[int]] = ()
    ) -> None:
        self._curves = curves
        self._room = room
        self._forbidden = np.flatnonzero(~allowed)
        self._joint = joint
        self.least = float("inf")
        self._bounds = list(zip(curves.start[:-1].tolist(), curves.start[1:].tolist(), strict=True))

    def at(self, prices: Floats) -> Priced:
        """The best prefixes at these prices, the shortest where several are."""
        curves = self._curves
        value = -curves.lost - prices @ curves.cost
        value[self._forbidden] = -np.inf
        counts = np.array([value[a:b].argmax() for a, b in self._bounds], dtype=np.int64)
        for members in self._joint:
            self._settle(members, value, counts)
        dual = float(value[curves.at(counts)].sum() + prices @ self._room)
        self.least = min(self.least, dual)
        return Priced(counts, prices, dual)

    def excess(self, priced: Priced) -> Floats:
        """By how much each bound is exceeded."""
        at = self._curves.at(priced.counts)
        return np.asarray(self._curves.cost[:, at].sum(axis=1) - self._room)

    def solve(self, prices: Floats) -> Priced:
        """The least dual, found from these prices one cost at a time; within the bounds if it can.

        The last price is one at which its bound holds.
        """
        costs = len(self._room)
        for sweep in range(_SWEEPS if costs > 1 else 1):
            before = prices
            for index in range(costs):
                prices = self._set_price(prices, index)
            if sweep and np.allclose(prices, before, rtol=1e-6, atol=0):
                break
        return self.at(prices)

    def _set_price(self, prices: Floats, index: int) -> Floats:
        """The least price of one cost at which its bound holds, the others held."""

        def at(price: float) -> tuple[float, float, Floats]:
            tried = prices.copy()
            tried[index] = price
            found = self.at(tried)
            return found.dual, float(self.excess(found)[index]), tried

        low = high = 0.0
        below = at(low)
        if below[1] <= 0:
            return below[2]
        high = float(prices[index]) or self._first_price(index)
        above = at(high)
        for _ in range(_HALVINGS):
            if above[1] <= 0:
                break
            low, below = high, above
            high *= 4
            above = at(high)
        for _ in range(_HALVINGS):
            # Where the tangents of the convex dual at both ends meet; its slope is -excess.
            drop = below[1] - above[1]
            if drop <= 0 or above[1] > 0:
                break
            middle = (below[0] - above[0] + below[1] * low - above[1] * high) / drop
            if not low < middle < high:
                break
            found = at(middle)
            tangent = below[0] - below[1] * (middle - low)
            if found[0] <= tangent + 1e-12 * max(1.0, abs(tangent)):
                if found[1] <= 0:
                    above = found
                break
            if found[1] <= 0:
                high, above = middle, found
            else:
                low, below = middle, found
        return above[2]

    def _first_price(self, index: int) -> float:
        """What a cost is worth if all that can be lost pays for all that can be saved."""
        lost, saved = float(self._curves.lost.max()), float(-self._curves.cost[index].min())
        return lost / saved if lost > 0 and saved > 0 else 1.0

    def _settle(self, members: Sequence[int], value: Floats, counts: Ints) -> None:
        """Let all of these chains begin, or none, whichever is worth more."""
        none = sum(float(value[self._bounds[n][0]]) for n in members)
        inner = [value[a + 1 : b] for a, b in (self._bounds[n] for n in members)]
        some = sum(float(own.max()) for own in inner)
        for n, own in zip(members, inner, strict=True):
            counts[n] = 1 + int(own.argmax()) if some > none else 0
