"""Widths of which one has to be a divisor of another, as heads of the hidden size in a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prunus.errors import BudgetError, PlanError
from prunus.graph.axis import Mask
from prunus.graph.groups import Divisible, find_violation
from prunus.planner.removal import TOLERANCE, Removal
from prunus.planner.steps import Quanta

Ints = NDArray[np.int64]

Counts = Mapping[int, int]
"""How many quanta are removed, by the number of their chain."""

_NEAREST = 48
"""Combinations of widths that are planned, the nearest first, before those that remove more."""

_TRIES = 400
"""Combinations that are planned at most."""

_ENOUGH = 6
"""Plans within the bounds of which the best is taken."""


class Attempt(NamedTuple):
    """A removal, and a sum of scores than which no choice loses less; None where none is known."""

    removal: Removal
    least_lost: float | None


def choose_divisible(
    rules: Sequence[Divisible],
    quanta: Quanta,
    attempt: Callable[[Counts], Attempt],
    asked: Counts,
    *,
    by_score: bool,
) -> Attempt:
    """The best attempt that keeps all rules.

    Combinations of widths that keep them are planned, those nearest to the choice without any rule
    first; of the results within the bounds the best is taken.

    Parameters
    ----------
    attempt
        Plans with so many quanta of some chains removed.
    asked
        What given ratios say of chains; the widths nearest to them are taken.
    by_score
        Whether retained importance decides between results that use the bounds equally well.

    Raises
    ------
    BudgetError
        If no combination is within the bounds.
    PlanError
        If the nearest widths remove more or less than given ratios say by over half of it.
    """
    first = attempt({})
    if not find_violation(rules, quanta.kept(first.removal.removed)):
        return first
    grid = _Grid(rules, quanta)
    asked = {n: count for n, count in asked.items() if n in grid.chains}
    refusals: list[BudgetError] = []
    found: list[Attempt] = []
    nearest = islice(grid.ordered(grid.counts_of(first.removal.removed), asked), _TRIES)
    for trial in _attempts(attempt, nearest, refusals):
        if find_violation(rules, quanta.kept(trial.removal.removed)):
            continue
        found.append(trial)
        if len(found) == _ENOUGH or not trial.removal.limits:
            break
    if not found:
        raise (
            refusals[0]
            if refusals
            else PlanError(
                "no widths near the given ratios can be combined",
                why="; ".join(dict.fromkeys(rule.reason for rule in rules)),
                fix="give another ratio for one of the groups, or leave it to a budget",
            )
        )
    return min(found, key=lambda one: _key(one.removal, by_score))


def _attempts(
    attempt: Callable[[Counts], Attempt], counts: Iterable[Counts], refusals: list[BudgetError]
) -> Iterator[Attempt]:
    """What can be planned; that a budget is out of reach is added to ``refusals``."""
    for some in counts:
        try:
            yield attempt(some)
        except BudgetError as error:
            refusals.append(error)
        except PlanError:  # a floor is in the way
            continue


def _key(removal: Removal, by_score: bool) -> tuple[float, float]:
    """How far away the bounds are, in steps of the tolerance, and what is lost; less is better."""
    slack = removal.slack() if removal.limits else 0.0
    return float(int(slack / TOLERANCE)), -removal.retained if by_score else 0.0


class _Grid:
    """All combinations of numbers of quanta, of the chains that rules speak of, that keep them."""

    def __init__(self, rules: Sequence[Divisible], quanta: Quanta) -> None:
        self._quanta = quanta
        sets = {id(units): units for rule in rules for one in (rule.width, rule.divisor)
                for units in one.sets}  # fmt: skip
        meant = np.setdiff1d(quanta.owner[np.concatenate([*sets.values()])], [0])
        self.chains = [n for n, chain in enumerate(quanta.chains) if np.isin(chain, meant).any()]
        sizes = [len(quanta.chains[n]) + 1 for n in self.chains]
        grid = np.indices(sizes).reshape(len(sizes), -1)
        kept = {key: np.full(grid.shape[1], len(units)) for key, units in sets.items()}
        for n, counts in zip(self.chains, grid, strict=True):
            for key, units in sets.items():
                inside = np.bincount(quanta.owner[units], minlength=len(quanta.scores))
                lost = np.cumsum([0, *inside[quanta.chains[n]]])
                kept[key] -= lost[counts]
        good = np.ones(grid.shape[1], dtype=np.bool_)
        for rule in rules:
            good &= rule.holds(lambda units: kept[id(units)])
        self._grid = grid[:, good]

    def counts_of(self, removed: Mask) -> Ints:
        """How many quanta of each chain are removed."""
        return np.array([int(removed[self._quanta.chains[n]].sum()) for n in self.chains])

    def ordered(self, start: Ints, asked: Counts) -> Iterator[dict[int, int]]:
        """Those near a start, then those near it that remove no less of any chain, then the rest.

        Chains of which something is asked lose that or nearly.
        """
        grid = self._grid
        spans = np.array([[max(len(self._quanta.chains[n]), 1)] for n in self.chains])
        distance = (((grid - start[:, None]) / spans) ** 2).sum(axis=0)
        for n, count in asked.items():
            far = np.abs(grid[self.chains.index(n)] - count)
            distance = np.where(2 * far <= count, distance + 1e3 * far, np.inf)
        order = np.argsort(distance, kind="stable")
        order = order[np.isfinite(distance[order])]
        more = order[(grid[:, order] >= start[:, None]).all(axis=0)]
        for at in dict.fromkeys([*order[:_NEAREST], *more[:_NEAREST], *order]):
            yield dict(zip(self.chains, grid[:, at].tolist(), strict=True))
