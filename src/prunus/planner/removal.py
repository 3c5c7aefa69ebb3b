"""A choice of quanta that are gone, with its exact costs and what its floors and bounds allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.planner.cost import CostState
from prunus.planner.steps import Quanta

Ints = NDArray[np.int64]

TOLERANCE = 0.01
"""How far under its bound the result may lie, as a part of the dense cost."""


@dataclass(frozen=True)
class Floors:
    """Units that every group keeps at least, and the options that said so."""

    units: tuple[int, ...]
    options: str


class Removal:
    """Quanta that are gone.

    Parameters
    ----------
    graph, quanta
        What may be removed.
    limits
        The bounds, by the names of the costs.
    floors
        What has to stay of every group.

    Attributes
    ----------
    removed
        Which quanta are gone, by id.
    state
        Their costs.
    limits
        The bounds, in the order of the state's costs.
    dense
        The costs while nothing is gone.
    """

    def __init__(
        self,
        graph: CouplingGraph,
        quanta: Quanta,
        limits: Mapping[str, int],
        floors: Floors,
    ) -> None:
        self._graph = graph
        self._quanta = quanta
        self._names = sorted(limits)
        self.limits = [limits[name] for name in self._names]
        self._floors = floors
        self._chains = [chain.tolist() for chain in quanta.chains]
        self._left = [group.size for group in graph.groups]
        self.state = CostState(graph, self._names, quanta.owner)
        self.dense = tuple(self.state.costs)
        self._taken: list[int] = []
        self._chain_of = {q: n for n, chain in enumerate(self._chains) for q in chain}
        self._gate_of = {
            quantum: chain[0]
            for chain in self._chains
            for quantum in chain[1:]
            if chain[0] in quanta.gates
        }
        self.removed = np.zeros(len(quanta.scores), dtype=np.bool_)

    @property
    def retained(self) -> float:
        """The sum of the scores of the quanta that stay."""
        return float(self._quanta.scores[~self.removed].sum())

    @property
    def chains(self) -> tuple[Ints, ...]:
        """The quanta that may leave and come back, chain by chain."""
        return tuple(np.array(chain, dtype=np.int64) for chain in self._chains if chain)

    @property
    def spare(self) -> Ints:
        """Units of every group above its floor."""
        return self.left - np.array(self._floors.units, dtype=np.int64)

    @property
    def left(self) -> Ints:
        """Units of every group that stay."""
        return np.array(self._left, dtype=np.int64)

    def units_taken(self, chain: Ints) -> tuple[Ints, Ints]:
        """Groups, and the units that each prefix takes of them, shape ``(n + 1, groups)``."""
        share = self._quanta.share
        order = np.argsort(chain, kind="stable")
        ids = chain[order]
        rows = share[
            np.searchsorted(share[:, 0], ids[0]) : np.searchsorted(share[:, 0], ids[-1] + 1)
        ]
        at = np.minimum(np.searchsorted(ids, rows[:, 0]), len(ids) - 1)
        own = ids[at] == rows[:, 0]
        rows, length = rows[own], order[at[own]] + 1
        groups = np.unique(rows[:, 1])
        taken = np.zeros((len(chain) + 1, len(groups)), dtype=np.int64)
        np.add.at(taken, (length, np.searchsorted(groups, rows[:, 1])), rows[:, 2])
        return groups, np.cumsum(taken, axis=0)

    def adopt(self, removed: Mask) -> bool:
        """Let exactly the quanta of a mask be gone; those worth least count as gone first.

        Where a group lies below its floor then, or a dim is empty, the last ones come back; False
        if that doesn't help.
        """
        self.state.assign(removed)
        self.removed = removed.copy()
        rows = self._quanta.share[removed[self._quanta.share[:, 0]]]
        gone = np.bincount(rows[:, 1], weights=rows[:, 2], minlength=len(self._floors.units))
        sizes = [group.size for group in self._graph.groups]
        self._left = [n - int(lost) for n, lost in zip(sizes, gone.tolist(), strict=True)]
        self._taken = self._by_worth()
        return self._reinstate()

    def _by_worth(self) -> list[int]:
        """The quanta that are gone, by score per cost; none before those of its chain."""
        parts = [chain[self.removed[chain]] for chain in self.chains]
        ids = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
        ids = ids[np.sort(np.unique(ids, return_index=True)[1])]  # a gate stands in several
        cost = self.state.expense(ids, [1 / max(limit, 1) for limit in self.limits])
        worth = np.zeros(len(self.removed))
        worth[ids] = self._quanta.scores[ids] / np.maximum(cost, np.finfo(float).tiny)
        for part in parts:
            worth[part] = np.maximum.accumulate(worth[part])
        found: list[int] = ids[np.argsort(worth[ids], kind="stable")].tolist()
        return found

    def _reinstate(self) -> bool:
        """Put back what groups and dims need, the last removed first; whether that is enough."""
        floors, left = self._floors.units, self._left
        short = {n for n, least in enumerate(floors) if left[n] < least}
        empty = set(self.state.empty)
        followers = self._followers()
        for quantum in list(reversed(self._taken)) if short or empty else []:
            groups = {group for group, _ in self._quanta.shares[quantum]}
            needed = short & groups or empty.intersection(self.state.positions.dims_of(quantum))
            if not needed or followers.get(quantum):
                continue
            self._give(quantum)
            if quantum in self._gate_of:
                followers[self._gate_of[quantum]] -= 1
            short -= {n for n in groups if left[n] >= floors[n]}
            empty &= set(self.state.empty)
        self._taken = [quantum for quantum in self._taken if self.removed[quantum]]
        return not short and not empty

    def _followers(self) -> dict[int, int]:
        """How many quanta are gone behind every gate, which must stay gone as long as they are."""
        followers = dict.fromkeys(self._quanta.gates, 0)
        for quantum in self._taken:
            if quantum in self._gate_of:
                followers[self._gate_of[quantum]] += 1
        return followers

    def _may_take(self, quantum: int) -> bool:
        return not self._at_floor(quantum) and self.state.removable(quantum)

    def _at_floor(self, quantum: int) -> bool:
        floors = self._floors.units
        return any(self._left[g] - n < floors[g] for g, n in self._quanta.shares[quantum])

    def _take(self, quantum: int, *, priced: bool = True) -> None:
        if priced:
            self.state.remove(quantum)
        else:
            self.state.remove_unpriced(quantum)
        self.removed[quantum] = True
        self._taken.append(quantum)
        for group, count in self._quanta.shares[quantum]:
            self._left[group] -= count

    def _give(self, quantum: int) -> None:
        self.state.restore(quantum)
        self.removed[quantum] = False
        for group, count in self._quanta.shares[quantum]:
            self._left[group] += count

    def _fits(self, quantum: int) -> bool:
        expenses = self.state.expenses(quantum)
        costs = zip(self.state.costs, expenses, self.limits, strict=True)
        return all(cost + more <= limit for cost, more, limit in costs)

    def _worst(self) -> int | None:
        """The bound that is exceeded by the largest factor; None when all hold."""
        over = [
            (-cost / max(limit, 1), index)
            for index, (cost, limit) in enumerate(zip(self.state.costs, self.limits, strict=True))
            if cost > limit
        ]
        return min(over)[1] if over else None

    def slack(self, costs: Sequence[int] | None = None) -> float:
        """Room under the tightest bound, as a part of the dense cost; negative if it is broken."""
        now = self.state.costs if costs is None else costs
        return min(
            (limit - cost) / max(dense, 1)
            for cost, limit, dense in zip(now, self.limits, self.dense, strict=True)
        )
