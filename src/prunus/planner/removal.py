"""What is removed: prefixes of chains, with their exact costs, and the way to the bounds.

Every chain loses its quanta in order, so that a number per chain says everything.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunus.errors import BudgetError, PlanError
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.planner.cost import CostState
from prunus.planner.culprits import out_of_reach
from prunus.planner.steps import Quanta

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TOLERANCE = 0.01
"""How far under its bound the result may lie, as a part of the dense cost."""

_EXCHANGES = 16
"""How many chains may offer a quantum in exchange before the result is taken as it is."""


@dataclass(frozen=True)
class Floors:
    """Units that every group keeps at least, and the options that said so."""

    units: tuple[int, ...]
    options: str


class Removal:
    """Prefixes of chains that are removed.

    Parameters
    ----------
    graph, quanta
        What may be removed.
    limits
        The bounds, by the names of the costs.
    floors
        What every group keeps.
    ranks
        For every chain an ascending rank per quantum, the lowest are removed first; None for score
        per saving.

    Attributes
    ----------
    chains
        Quanta in the order in which they are removed.
    counts
        How many of each chain are removed.
    fixed
        Quanta that are removed for good, shape ``(quanta + 1,)``; they are in no chain.
    state
        The costs.
    limits
        The bounds, in the order of the state's costs.
    dense
        The costs while nothing is removed.
    """

    def __init__(
        self,
        graph: CouplingGraph,
        quanta: Quanta,
        limits: Mapping[str, int],
        floors: Floors,
        ranks: Sequence[Floats] | None = None,
    ) -> None:
        self._graph, self._quanta, self._floors = graph, quanta, floors
        self._names = sorted(limits)
        self.limits = [limits[name] for name in self._names]
        self.state = CostState(graph, self._names, quanta.owner)
        self.dense = tuple(self.state.costs)
        self.fixed = np.zeros(len(quanta.scores), dtype=np.bool_)
        self._open(quanta.chains, ranks)
        self._left = self._count_left(self.fixed)

    def _open(self, chains: Sequence[Ints], ranks: Sequence[Floats] | None) -> None:
        orders = self.state.positions.orders(chains, self._quanta.gates)
        self.chains = tuple(chain[own] for chain, own in zip(chains, orders, strict=True))
        if ranks is not None:
            pairs = zip(ranks, orders, strict=True)
            ranks = [np.maximum.accumulate(rank[own]) for rank, own in pairs]
        self.counts = np.zeros(len(self.chains), dtype=np.int64)
        self._ids = [chain.tolist() for chain in self.chains]
        self._ranks: list[list[float]] | None
        self._ranks = None if ranks is None else [rank.tolist() for rank in ranks]
        members: dict[int, list[int]] = {}
        for n, ids in enumerate(self._ids):
            members.setdefault(ids[0], []).append(n)
        self.joint = [numbers for numbers in members.values() if len(numbers) > 1]
        """Chains that begin with the same quantum: all of them begin, or none."""
        self._partners = {n: numbers for numbers in self.joint for n in numbers}

    def settle(self, quanta: Iterable[int], chains: Iterable[int], *, exactly: bool = True) -> None:
        """Remove quanta for good, and let nothing else of their chains be removed.

        Parameters
        ----------
        exactly
            Whether a quantum that can't be removed is an error; else it is kept.

        Raises
        ------
        PlanError
            If a floor forbids it, or a dim would be left empty.
        """
        for quantum in quanta:
            if self._at_floor(quantum) or not self.state.removable(quantum):
                if exactly:
                    raise self._forbidden(quantum)
                continue
            self._move(quantum, 1)
            self.fixed[quantum] = True
        closed = set(chains)
        held = {self._ids[n][0] for n in closed if not self.fixed[self._ids[n][0]]}
        there = {
            n: ~self.fixed[chain]
            for n, chain in enumerate(self.chains)
            if n not in closed and chain[0] not in held and not self.fixed[chain].all()
        }
        ranks: list[Floats] | None = None
        if self._ranks is not None:
            ranks = [np.array(self._ranks[n])[own] for n, own in there.items()]
        self._open([self.chains[n][own] for n, own in there.items()], ranks)

    @property
    def removed(self) -> Mask:
        """Which quanta are removed, by id."""
        return self.mask(self.counts)

    @property
    def retained(self) -> float:
        """The sum of the scores of the quanta that are kept."""
        return float(self._quanta.scores[~self.removed].sum())

    def mask(self, counts: Ints) -> Mask:
        """Which quanta are removed with prefixes of these lengths, shape ``(quanta + 1,)``."""
        parts = [chain[:n] for chain, n in zip(self.chains, counts.tolist(), strict=True)]
        found = self.fixed.copy()
        if parts:
            found[np.concatenate(parts)] = True
        return found

    def _feasible(self) -> bool:
        """Whether every group is above its floor, and every dim keeps a position."""
        floors = self._floors.units
        return not self.state.empty and all(
            left >= least for left, least in zip(self._left, floors, strict=True)
        )

    def adopt(self, counts: Ints) -> None:
        """Remove prefixes of these lengths."""
        removed = self.mask(counts)
        self.state.assign(removed)
        self.counts = counts.copy()
        self._left = self._count_left(removed)

    def _count_left(self, removed: Mask) -> list[int]:
        rows = self._quanta.share[removed[self._quanta.share[:, 0]]]
        gone = np.bincount(rows[:, 1], weights=rows[:, 2], minlength=len(self._graph.groups))
        sizes = (group.size for group in self._graph.groups)
        return [size - int(lost) for size, lost in zip(sizes, gone.tolist(), strict=True)]

    def descend(self) -> None:
        """Remove by priority, fill up, and exchange coarse steps for fine."""
        self.reduce()
        self.fill()
        self.exchange()

    def reduce(self) -> None:
        """Remove until every bound holds, the one that is furthest away first.

        Raises
        ------
        BudgetError
            If the floors don't allow the bounds; it says which, and how far one gets.
        """
        if self._ranks is not None:
            self._jump()
        while (bound := self._worst()) is not None:
            if not self._approach(bound):
                raise self._stopped()

    def _jump(self) -> None:
        """Go to the highest rank with which a bound is broken still and nothing is in the way."""
        assert self._ranks is not None
        every = np.unique(np.concatenate([np.zeros(0), *self._ranks]))
        low, high = -1, len(every)
        best = self.counts
        while high - low > 1:
            middle = (low + high) // 2
            counts = np.array(
                [np.searchsorted(rank, every[middle], "right") for rank in self._ranks]
            )
            for numbers in self.joint:
                counts[numbers] = np.maximum(counts[numbers], counts[numbers].max() > 0)
            self.adopt(np.maximum(counts, best))
            if self._feasible() and self._worst() is not None:
                low, best = middle, self.counts
            else:
                high = middle
        self.adopt(best)

    def disturb(self, moves: Mapping[int, int]) -> bool:
        """Remove some quanta more of some chains, or less, and let the others make up for it."""
        for n, more in moves.items():
            for _ in range(abs(more)):
                if not (self._may_take(n) if more > 0 else self._may_give(n)):
                    return False
                (self._take if more > 0 else self._give)(n)
        while (bound := self._worst()) is not None:
            if not self._approach(bound, held=moves):
                return False
        self.fill(held=moves)
        return True

    def fill(self, held: Collection[int] = ()) -> None:
        """Put back what fits, but of some chains, the last removed or the most important first."""
        heap = self._by_worth()
        while heap:
            n = -heapq.heappop(heap)[1]
            if n not in held and self._may_give(n) and self._fits(self._last(n)):
                self._give(n, heap)

    def exchange(self) -> None:
        """While too much is removed, put a quantum back and remove a better one, or finer ones."""
        for _ in range(_EXCHANGES if self.limits else 0):
            if self.slack() <= TOLERANCE or not self._exchange_one():
                return

    def _exchange_one(self) -> bool:
        """Leave less room than before by one exchange; False where none does."""
        slack = self.slack()
        for _, last in sorted(self._by_worth())[:_EXCHANGES]:
            n = -last
            if not self._may_give(n):
                continue
            before = self.counts.copy()
            self._give(n)
            finely = (max(TOLERANCE, slack / 2), slack)
            if self._trade(n, slack) or (
                any(map(self._reach_finely, finely)) and self.slack() < slack
            ):
                self.fill()
                return True
            self.adopt(before)
        return False

    def _trade(self, back: int, slack: float) -> bool:
        """Remove one quantum of another chain that leaves least room, less than ``slack``."""
        best: tuple[float, int] | None = None
        for n in range(len(self.chains)):
            if n == back or not self._may_take(n):
                continue
            savings = self.state.savings(self._ids[n][self.counts[n]])
            costs = zip(self.state.costs, savings, strict=True)
            room = self.slack([cost - saved for cost, saved in costs])
            if 0 <= room < slack and (best is None or room < best[0]):
                best = room, n
        if best is not None:
            self._take(best[1])
        return best is not None

    def _reach_finely(self, largest: float) -> bool:
        """Remove small quanta only until every bound holds; False where that can't be done.

        ``largest`` is the part of a dense cost that such a quantum saves at most.
        """
        while (bound := self._worst()) is not None:
            if not self._approach(bound, largest):
                return False
        return True

    def _approach(self, bound: int, largest: float = np.inf, held: Collection[int] = ()) -> bool:
        """Remove until one bound holds, but of some chains; False when nothing more can be removed.

        Savings only shrink while quanta are removed, so the key of a chain only grows, and an
        entry of the heap that is found to be current is the least of all.
        """
        free = (n for n in range(len(self.chains)) if n not in held)
        keys = ((self._key(n, bound, largest), n) for n in free)
        heap = [(key, n) for key, n in keys if key is not None]
        heapq.heapify(heap)
        while self.state.costs[bound] > self.limits[bound]:
            if not heap:
                return False
            known, n = heap[0]
            key = self._key(n, bound, largest)
            if key is not None and key <= known:
                key = None
                if self._may_take(n):
                    self._take(n)
                    key = self._key(n, bound, largest)
            if key is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (key, n))
        return True

    def _key(self, n: int, bound: int, largest: float) -> float | None:
        """Rank of the next quantum of a chain, or score per saving; None where there is none.

        A quantum that saves nothing, or more than ``largest``, ends the chain.
        """
        at = int(self.counts[n])
        if at == len(self._ids[n]):
            return None
        if self._ranks is not None and largest == np.inf:
            return self._ranks[n][at]
        savings = self.state.savings(self._ids[n][at])
        fine = all(s <= largest * dense for s, dense in zip(savings, self.dense, strict=True))
        if not savings[bound] or not fine:
            return None
        score = float(self._quanta.scores[self._ids[n][at]])
        return score / savings[bound] if self._ranks is None else self._ranks[n][at]

    def _by_worth(self) -> list[tuple[float, int]]:
        """A heap of the chains that lost something, the most valuable last quantum first."""
        found = [(-self._worth(n), -n) for n in np.flatnonzero(self.counts).tolist()]
        heapq.heapify(found)
        return found

    def _worth(self, n: int) -> float:
        """Of the last removed quantum of a chain: its rank, or its score per cost."""
        if self._ranks is not None:
            return self._ranks[n][int(self.counts[n]) - 1]
        last = self._last(n)
        expenses = self.state.expenses(last)
        cost = sum(e / max(limit, 1) for e, limit in zip(expenses, self.limits, strict=True))
        return float(self._quanta.scores[last]) / cost if cost else np.inf

    def _last(self, n: int) -> int:
        last: int = self._ids[n][self.counts[n] - 1]
        return last

    def _may_take(self, n: int) -> bool:
        if self.counts[n] == len(self._ids[n]):
            return False
        quantum = self._ids[n][self.counts[n]]
        return not self._at_floor(quantum) and self.state.removable(quantum)

    def _at_floor(self, quantum: int) -> bool:
        floors = self._floors.units
        return any(self._left[g] - n < floors[g] for g, n in self._quanta.shares[quantum])

    def _may_give(self, n: int) -> bool:
        """Whether the last quantum of a chain is that of no other chain that goes on."""
        partners = self._partners.get(n, ())
        return self.counts[n] > 0 and (
            self.counts[n] > 1 or all(self.counts[m] == 1 for m in partners)
        )

    def _take(self, n: int) -> None:
        self._move(self._ids[n][self.counts[n]], 1)
        self._count(n, 1)

    def _give(self, n: int, heap: list[tuple[float, int]] | None = None) -> None:
        self._move(self._last(n), -1)
        self._count(n, -1)
        if heap is not None and self.counts[n]:
            heapq.heappush(heap, (-self._worth(n), -n))

    def _count(self, n: int, more: int) -> None:
        first = self.counts[n] == (0 if more > 0 else 1)
        for m in self._partners.get(n, (n,)) if first else (n,):
            self.counts[m] += more

    def _move(self, quantum: int, sign: int) -> None:
        (self.state.remove if sign > 0 else self.state.restore)(quantum)
        for group, count in self._quanta.shares[quantum]:
            self._left[group] -= sign * count

    def _fits(self, quantum: int) -> bool:
        costs = zip(self.state.costs, self.state.expenses(quantum), self.limits, strict=True)
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

    def _forbidden(self, quantum: int) -> PlanError:
        """Why a ratio that was given can't be had."""
        floors, shares = self._floors.units, self._quanta.shares[quantum]
        below = [group for group, units in shares if self._left[group] - units < floors[group]]
        number = below[-1] if below else shares[0][0]
        group, left = self._graph.groups[number], self._left[number]
        least = floors[number] if below else left
        why = f"a dim would be left empty with less than {left} of its {group.size} units"
        if below:
            why = f"the floors ({self._floors.options}) keep {least} of its {group.size} units"
        return PlanError(
            "the group can't lose as many units as its ratio says",
            where=f"group {group.name}",
            why=why,
            fix=f"give a ratio of at most {(group.size - least) / group.size:.3g}",
        )

    def _stopped(self) -> BudgetError:
        """What was asked, how far one gets, and which groups stand in the way."""
        rows = zip(self._names, self.state.costs, self.limits, self.dense, strict=True)
        return out_of_reach(
            self._graph,
            [*rows],
            worst=self._worst() or 0,
            floors=self._floors.options,
            kept=self._quanta.kept(self.removed),
            reasons=self._quanta.untouched,
        )
