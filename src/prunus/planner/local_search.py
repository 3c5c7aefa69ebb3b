"""The last units: exact enumeration of what a few chains can exchange near a solution.

Prices leave a gap where a single unit is worth a good part of the budget.  There, all lengths of a
few chains within a window are tried at once, on exact costs, and the best is taken: the *core* of a
knapsack (Balas and Zemel 1980).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Mask
from prunus.planner.curves import CurveSource
from prunus.planner.removal import Removal
from prunus.planner.steps import Quanta

Ints = NDArray[np.int64]

_CELLS = 20_000
"""Combinations of lengths that are tried at once."""

_TOGETHER = 5
"""Chains that are looked at together."""

_ROUNDS = 12
"""How often all chains are dealt into new sets."""

_SAME = 1e-12
"""Sums of the same scores may differ by so much, as a part of them."""

_NUMBERS = 4_000_000
"""Entries of the largest table; where it would have more, the window is narrower."""


class Windows:
    """Better lengths of chains than the present ones, by enumeration.

    Parameters
    ----------
    removal
        A choice within the bounds and the floors.
    quanta
        What may be removed.
    fixed
        Quanta that have to stay gone.
    tolerance
        How far below its bound the tightest cost may lie, as a part of the dense cost.
    """

    def __init__(
        self, removal: Removal, quanta: Quanta, fixed: Mask, tolerance: float = 1.0
    ) -> None:
        removed, chains = removal.removed, removal.chains
        first = [int(chain[0]) for chain in chains]
        joint = {quantum for quantum in quanta.gates if first.count(quantum) > 1}
        self._held = [quantum in joint for quantum in first]
        # What is gone becomes a prefix, so that any choice is one of lengths.
        chains = tuple(np.concatenate([c[removed[c]], c[~removed[c]]]) for c in chains)
        self._state, self._limits = removal.state, removal.limits
        self._least = [
            limit - tolerance * dense
            for limit, dense in zip(removal.limits, removal.dense, strict=True)
        ]
        self._source = CurveSource(removal.state, chains, quanta.scores, fixed)
        self._counts = np.array([int(removed[c].sum()) for c in chains], dtype=np.int64)
        self._units = [removal.units_taken(chain) for chain in chains]
        self._spare = removal.spare

    def improve(self) -> Mask:
        """Look for better lengths until there are none in reach; the quanta that are gone then."""
        size = len(self._counts)
        draw = np.random.default_rng(0)
        sets = [list(range(size))] if size <= _TOGETHER else []
        for _ in range(_ROUNDS if not sets else 0):
            order = draw.permutation(size).tolist()
            sets += [order[at : at + _TOGETHER] for at in range(0, size, _TOGETHER)]
        self._state.assign(self._source.mask(self._counts))
        for members in sets:
            while self._improve(members):
                pass
        return self._source.mask(self._counts)

    def _improve(self, members: Sequence[int]) -> bool:
        """Move a few chains to the best lengths in their window; False if they are there."""
        lengths = self._window(members)
        at = [self._source.start[n] + length for n, length in zip(members, lengths, strict=True)]
        lost = sum(self._source.lost[place] for place in at)
        present = sum(self._source.lost[self._source.start[n] + self._counts[n]] for n in members)
        better = np.flatnonzero(lost < present - _SAME * present)
        if not len(better):
            return False
        lengths = [length[better] for length in lengths]
        good = self._within(members, lengths)
        if not good.any():
            return False
        best = int(np.where(good, lost[better], np.inf).argmin())
        for n, length in zip(members, lengths, strict=True):
            groups, taken = self._units[n]
            self._spare[groups] += taken[self._counts[n]] - taken[length[best]]
            self._counts[n] = length[best]
        self._state.assign(self._source.mask(self._counts))
        return True

    def _window(self, members: Sequence[int]) -> list[Ints]:
        """All combinations of lengths near the present ones: one array per chain."""
        footings = [self._source.footings[n] for n in members]
        widest = 1 + sum(len(f.positions) for f in footings)
        widest = max(widest, *(len(c) for f in footings for c, _, _ in f.reach.terms))
        cells = min(_CELLS, _NUMBERS // widest)
        radius = max(1, (int(cells ** (1 / len(members))) - 1) // 2)
        ranges = []
        for n in members:
            count = int(self._counts[n])
            least, most = max(0, count - radius), min(len(self._source.chains[n]), count + radius)
            if self._held[n]:
                least, most = (max(1, least), most) if count else (0, 0)
            ranges.append(np.arange(least, most + 1))
        return [grid.ravel() for grid in np.meshgrid(*ranges, indexing="ij")]

    def _within(self, members: Sequence[int], lengths: Sequence[Ints]) -> Mask:
        """Which combinations hold every bound and every floor, and leave every dim a position."""
        size = len(lengths[0])
        more = np.zeros((size, len(self._spare)), dtype=np.int64)
        for n, length in zip(members, lengths, strict=True):
            groups, taken = self._units[n]
            more[:, groups] += taken[length] - taken[self._counts[n]]
        good = (more <= self._spare).all(axis=1)
        dims, widths = self._widths(members, lengths)
        good &= (widths[:, :-1] > 0).all(axis=1)
        close = np.zeros(size, dtype=np.bool_)
        for index, (constants, table, places) in enumerate(self._state.reach(dims).terms):
            outside = np.where(places < len(dims), 1, self._state.widths[table]).prod(axis=1)
            products = widths[:, places].prod(axis=2)
            now = self._state.widths[table].prod(axis=1)
            change = (products * (constants * outside)).sum(axis=1) - (constants * now).sum()
            cost = self._state.costs[index] + change
            good &= cost <= self._limits[index]
            close |= cost >= self._least[index]
        return np.asarray(good & close, dtype=np.bool_)

    def _widths(self, members: Sequence[int], lengths: Sequence[Ints]) -> tuple[Ints, Any]:
        """The dims of some chains, and their widths with every combination; then ones."""
        footings = [self._source.footings[n] for n in members]
        dims = np.unique(np.concatenate([footing.dims for footing in footings]))
        shape = (len(lengths[0]), len(dims))
        lost = np.zeros(shape, dtype=np.int64)
        for n, footing, length in zip(members, footings, lengths, strict=True):
            own = np.searchsorted(dims, footing.dims)
            lost[:, own] += footing.taken[length] - footing.taken[self._counts[n]]
        lost += self._crossing(members, lengths, dims)
        widths = self._state.widths[dims] - lost
        return dims, np.concatenate([widths, np.ones((shape[0], 1), dtype=widths.dtype)], axis=1)

    def _crossing(self, members: Sequence[int], lengths: Sequence[Ints], dims: Ints) -> Ints:
        """Positions that several chains could take: how many more of every dim are gone."""
        footings = [self._source.footings[n] for n in members]
        touched = np.unique(np.concatenate([footing.positions for footing in footings]))
        deaths = self._source.deaths(self._counts)[touched]
        dead = np.zeros((len(lengths[0]), len(touched)), dtype=np.bool_)
        for n, footing, length in zip(members, footings, lengths, strict=True):
            at = np.searchsorted(touched, footing.positions)
            dead[:, at] |= footing.lengths <= length[:, None]
            deaths[at] -= footing.lengths <= self._counts[n]
        dead |= deaths > 0  # by a chain that is held
        before = self._source.deaths(self._counts)[touched] > 0
        home = np.searchsorted(dims, self._state.positions.shared_dim[touched])
        found = np.zeros((len(dead), len(dims)), dtype=np.int64)
        np.add.at(found.T, home, dead.T.astype(np.int64) - before[:, None])
        return found
