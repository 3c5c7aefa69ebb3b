"""A choice under the bounds that retains as much importance as can be, and what none exceeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

from prunus.planner.bound import least_loss
from prunus.planner.removal import TOLERANCE, Removal
from prunus.planner.steps import Quanta

_COARSE = 2_000
"""Up to so many quanta a single one matters, so that chains are disturbed one after the other."""

_MANY = 64
"""Beyond so many chains only one quantum of each is tried."""

_FEW = 8
"""Up to so many chains are disturbed two at a time as well."""

_ROUNDS = 2
"""How often all chains are."""

_ROUNDED = (2 * TOLERANCE, 4 * TOLERANCE)
"""Where widths are rounded: how far under its bound a result may lie that comes no closer."""


def solve(removal: Removal, quanta: Quanta) -> float | None:
    """Choose the quanta to remove; what is fixed stays removed.

    The units of least importance per saving are removed first, and what still fits is put back.
    Then one chain after the other is disturbed, and the rest repaired; what is better is kept.  A
    result that uses the bounds up to their tolerance is better than one that does not, and then one
    that retains more importance.

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
    gone = float(quanta.scores[removal.fixed].sum())
    if not removal.chains or not removal.limits:
        removal.descend()
        return gone
    bound = least_loss(removal.state, removal.chains, quanta.scores, removal.limits, removal.fixed)
    removal.adopt(removal.counts)
    removal.reduce()
    removal.fill()
    rooms = (TOLERANCE, *(_ROUNDED if quanta.rounded else ()))

    def lack() -> tuple[int, float]:
        """How far away the bounds are, then what is lost; less is better."""
        slack = removal.slack()
        return sum(slack > room for room in rooms), -removal.retained

    coarse = len(quanta.scores) <= _COARSE
    if coarse:
        _improve(removal, lack)
    if removal.slack() > TOLERANCE:
        best, least = removal.counts.copy(), lack()
        removal.exchange()
        if coarse:
            _improve(removal, lack)
        if lack() > least:
            removal.adopt(best)
    return None if bound is None else gone + bound


def _improve(removal: Removal, lack: Callable[[], tuple[int, float]]) -> None:
    """Disturb one chain after the other, repair, and keep what is better."""
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
    for n in range(chains):
        yield from ({n: more} for more in ((1, -1, 2, -2) if chains <= _MANY else (1, -1)))
    if chains <= _FEW:
        for n, m in combinations(range(chains), 2):
            yield from ({n: a, m: b} for a in (1, -1) for b in (1, -1))
