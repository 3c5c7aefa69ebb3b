"""What every chain loses and saves with each prefix of its quanta, the other chains held.

Costs multiply the widths of neighbours, so what one chain saves depends on the rest.  Curves are
taken at some widths: exact where one chain moves alone, and off by the products of changes where
several do.  At the dense widths a sum of curves never says less than what is saved in all, since
what two chains take together is counted twice: hence the bound of :mod:`prunus.planner.lagrange`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Mask
from prunus.planner.cost import CostState, Reach

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curves:
    """All prefixes of all chains, one chain after the other: ``n + 1`` of a chain of ``n``.

    Attributes
    ----------
    start
        Where every chain begins; one entry more than chains.
    lost
        Sum of the scores of each prefix, shape ``(prefixes,)``.
    cost
        Each cost with the prefix in place of the present one, less the present cost; shape
        ``(costs, prefixes)``.
    possible
        Prefixes that leave every dim a position.
    """

    start: Ints
    lost: Floats
    cost: Floats
    possible: Mask

    def at(self, counts: Ints) -> Ints:
        """Where these prefixes stand in the arrays; ``counts`` are their lengths."""
        return np.asarray(self.start[:-1] + counts)


@dataclass(frozen=True, eq=False)
class Footing:
    """What one chain stands on.

    Attributes
    ----------
    dims
        Those of which it takes positions.
    taken
        How many it takes with every prefix that no other chain could take, ``(n + 1, dims)``.
    positions, lengths, places
        Every position that other chains could take as well, the length of the prefix with which
        this one does, and the place of the position's dim in ``dims``.
    reach
        The monomials that see the dims.
    """

    dims: Ints
    taken: Ints
    positions: Ints
    lengths: Ints
    places: Ints
    reach: Reach


class CurveSource:
    """Curves of a graph at any lengths of its chains.

    Parameters
    ----------
    state
        Costs and widths; it is left where the last curves were taken.
    chains
        Ids of quanta, in the order in which they leave.  A quantum that stands in several counts
        for the first.
    scores
        Of every quantum.
    fixed
        Quanta that are gone whatever the lengths; they stand in no chain.
    """

    def __init__(
        self, state: CostState, chains: Sequence[Ints], scores: Floats, fixed: Mask
    ) -> None:
        self._state = state
        self._fixed = fixed
        self.chains = chains
        sizes = np.array([len(chain) for chain in chains], dtype=np.int64)
        self.start = np.concatenate([[0], np.cumsum(sizes + 1)])
        self._home = np.full(len(scores), -1, dtype=np.int64)
        self._length = np.zeros(len(scores), dtype=np.int64)  # of the prefix that it ends
        lost = np.zeros(int(self.start[-1]))
        for n in reversed(range(len(chains))):
            self._home[chains[n]] = n
            self._length[chains[n]] = np.arange(1, len(chains[n]) + 1)
        for n, chain in enumerate(chains):
            own = np.where(self._home[chain] == n, scores[chain], 0.0)
            lost[self.start[n] + 1 : self.start[n + 1]] = np.cumsum(own)
        self.lost = lost
        lone = state.positions.lone
        home = self._home[lone[:, 0]]
        order = np.argsort(home, kind="stable")
        self._lone = lone[order]
        self._lone_start = np.searchsorted(home[order], np.arange(len(chains) + 1)).tolist()
        self._read_crossings()
        self.footings = [self._form(n) for n in range(len(chains))]
        self._patterns = [
            [_patterns(places) for _, _, places in footing.reach.terms] for footing in self.footings
        ]

    def mask(self, counts: Ints) -> Mask:
        """The quanta that are gone with prefixes of these lengths, shape ``(quanta + 1,)``."""
        home = self._home
        return np.asarray(self._fixed | ((home >= 0) & (self._length <= counts[home])))

    @property
    def costs(self) -> Floats:
        """The costs where the last curves were taken."""
        return np.array(self._state.costs, dtype=np.float64)

    def costs_at(self, counts: Ints) -> Floats:
        """The costs, exactly counted, with prefixes of these lengths."""
        self._state.assign(self.mask(counts))
        return self.costs

    def curves(self, counts: Ints) -> Curves:
        """The curves where the chains have lost prefixes of these lengths."""
        self._state.assign(self.mask(counts))
        deaths = self.deaths(counts)
        cost = np.zeros((len(self._state.costs), int(self.start[-1])))
        possible = np.ones(cost.shape[1], dtype=np.bool_)
        for n, footing in enumerate(self.footings):
            own = slice(int(self.start[n]), int(self.start[n + 1]))
            count = int(counts[n])
            widths = self._widths(footing, count, deaths)
            possible[own] = (widths[:, :-1] > 0).all(axis=1)
            for index, patterns in enumerate(self._patterns[n]):
                values = self._values(footing, index, patterns, widths)
                cost[index, own] = values - values[count]
        return Curves(self.start, self.lost, cost, possible)

    def deaths(self, counts: Ints) -> Ints:
        """How many chains have taken every shared position."""
        dead = self._crossing_position[self._crossing_length <= counts[self._crossing_home]]
        return self._state.positions.gone(self._fixed) + np.bincount(
            dead, minlength=len(self._state.positions.shared_dim)
        )

    def _widths(self, footing: Footing, count: int, deaths: Ints) -> Floats:
        """Widths of the chain's dims with every prefix, and a column of ones."""
        taken = footing.taken
        alive = deaths[footing.positions] == (footing.lengths <= count)
        if alive.any():
            more = np.zeros_like(taken)
            np.add.at(more, (footing.lengths[alive], footing.places[alive]), 1)
            taken = taken + np.cumsum(more, axis=0)
        now = self._state.widths[footing.dims].astype(np.float64)
        return np.concatenate([now + taken[count] - taken, np.ones((len(taken), 1))], axis=1)

    def _values(
        self, footing: Footing, index: int, patterns: tuple[Ints, Ints], widths: Floats
    ) -> Floats:
        """The part of a cost that sees the chain, with every prefix."""
        constants, table, places = footing.reach.terms[index]
        others = np.where(places < len(footing.dims), 1, self._state.widths[table])
        factors = (constants * others.prod(axis=1)).astype(np.float64)
        summed = np.bincount(patterns[1], weights=factors, minlength=len(patterns[0]))
        total = np.zeros(len(widths))
        for factor, pattern in zip(summed.tolist(), patterns[0], strict=True):
            total += factor * widths[:, pattern].prod(axis=1)
        return total

    def _read_crossings(self) -> None:
        """For every shared position and chain: with which prefix the chain takes it."""
        positions = self._state.positions
        quantum, position = positions.shared.T
        known = self._home[quantum] >= 0
        quantum, position = quantum[known], position[known]
        order = np.lexsort((self._length[quantum], position, self._home[quantum]))
        home, position = self._home[quantum][order], position[order]
        first = np.ones(len(order), dtype=np.bool_)
        first[1:] = (home[1:] != home[:-1]) | (position[1:] != position[:-1])
        self._crossing_home, self._crossing_position = home[first], position[first]
        self._crossing_length = self._length[quantum][order][first]

    def _form(self, n: int) -> Footing:
        quantum, dim, times = self._lone[self._lone_start[n] : self._lone_start[n + 1]].T
        part = slice(*np.searchsorted(self._crossing_home, [n, n + 1]).tolist())
        position = self._crossing_position[part]
        crossed = self._state.positions.shared_dim[position]
        dims = np.union1d(dim, crossed)
        taken = np.zeros((len(self.chains[n]) + 1, len(dims)), dtype=np.int64)
        np.add.at(taken, (self._length[quantum], np.searchsorted(dims, dim)), times)
        return Footing(
            dims=dims,
            taken=np.cumsum(taken, axis=0),
            positions=position,
            lengths=self._crossing_length[part],
            places=np.searchsorted(dims, crossed),
            reach=self._state.reach(dims),
        )


def _patterns(places: Ints) -> tuple[Ints, Ints]:
    """The different products of a chain's own dims, and which of them every monomial has."""
    unique, which = np.unique(np.sort(places, axis=1), axis=0, return_inverse=True)
    return unique, which.ravel()
