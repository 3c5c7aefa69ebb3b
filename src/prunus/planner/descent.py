"""The descent to the budget: remove by priority, fill up, and exchange coarse steps for fine."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

from prunus.errors import BudgetError, PlanError
from prunus.graph.coupling import CouplingGraph
from prunus.planner.culprits import NOTHING_THERE, tell_pins
from prunus.planner.removal import TOLERANCE, Floors, Removal
from prunus.planner.steps import Quanta

_EXCHANGES = 16
"""How many chains may offer a quantum in exchange before the result is taken as it is."""

_FAR = 64
"""Fewer steps than this are not worth the question whether they can go without a look."""

_NAMED = 5
"""How many groups an error names."""


class Descent(Removal):
    """A removal on its way to the budget, one quantum after another.

    Parameters
    ----------
    graph, quanta, limits, floors
        As for :class:`~prunus.planner.removal.Removal`.
    ranks
        For every chain a rank per quantum, the lowest leaves first; None for score per saving.
    """

    def __init__(
        self,
        graph: CouplingGraph,
        quanta: Quanta,
        limits: Mapping[str, int],
        floors: Floors,
        ranks: Sequence[Sequence[float]] | None,
    ) -> None:
        super().__init__(graph, quanta, limits, floors)
        self._ranks = ranks
        self._scores = quanta.scores.tolist()

    def descend(self) -> None:
        """Remove by priority, fill up, and exchange coarse steps for fine."""
        self.reduce()
        self.fill()
        self.exchange()

    def settle(self, quanta: Iterable[int], chains: Iterable[int]) -> None:
        """Remove quanta for good, and let nothing else go from their chains.

        Raises
        ------
        PlanError
            If a floor forbids it, or a dim would be left empty.
        """
        for quantum in quanta:
            if not self._may_take(quantum):
                raise self._forbidden(quantum)
            self._take(quantum)
        self._taken.clear()
        for chain in chains:
            self._chains[chain] = []

    def _forbidden(self, quantum: int) -> PlanError:
        """Why a ratio that was given can't be had."""
        group, count = self._quanta.shares[quantum][0]
        floors = self._floors.units
        for one, units in self._quanta.shares[quantum]:
            if self._left[one] - units < floors[one]:
                group, count = one, units
        name, size = self._graph.groups[group].name, self._graph.groups[group].size
        left = self._left[group]
        least = left
        why = f"a dim would be left empty with less than {left} of its {size} units"
        if left - count < floors[group]:
            least = floors[group]
            why = f"the floors ({self._floors.options}) keep {least} of its {size} units"
        return PlanError(
            "the group can't lose as many units as its ratio says",
            where=f"group {name}",
            why=why,
            fix=f"give a ratio of at most {(size - least) / size:.3g}",
        )

    def reduce(self) -> None:
        """Remove until every bound holds, the one that is furthest away first."""
        while (bound := self._worst()) is not None:
            if not self._approach(bound):
                raise self._stopped()

    def fill(self) -> None:
        """Put back what still fits, the last removed first."""
        closed: set[int] = set()
        followers = self._followers()
        # A gate leaves before the rest of its chain, so its turn comes after theirs.
        for quantum in reversed(self._taken):
            kind = self.state.kind(quantum)
            if kind in closed or followers.get(quantum):
                continue
            if self._fits(quantum):
                self._give(quantum)
                if quantum in self._gate_of:
                    followers[self._gate_of[quantum]] -= 1
            elif kind >= 0:  # costs grow from here on, so no other of that kind will fit
                closed.add(kind)
        self._taken = [quantum for quantum in self._taken if self.removed[quantum]]

    def exchange(self) -> None:
        """While too much is gone, put a quantum back and remove a better one, or finer ones."""
        for _ in range(_EXCHANGES if self.limits else 0):
            if self.slack() <= TOLERANCE or not self._exchange_one():
                return

    def _exchange_one(self) -> bool:
        """Leave less room than before by one exchange; False where none does."""
        tried: set[int] = set()
        followers = self._followers()
        slack = self.slack()
        for quantum in list(reversed(self._taken)):
            chain = self._chain_of[quantum]
            if not self.removed[quantum] or followers.get(quantum) or chain in tried:
                continue
            if len(tried) >= _EXCHANGES:
                break
            tried.add(chain)
            before = len(self._taken)
            self._give(quantum)
            finely = (max(TOLERANCE, slack / 2), slack)
            if self._trade(quantum, slack) or (
                any(map(self._reach_finely, finely)) and self.slack() < slack
            ):
                self._taken.remove(quantum)
                self.fill()
                return True
            for taken in reversed(self._taken[before:]):
                self._give(taken)
            del self._taken[before:]
            self._take(quantum)
            self._taken.pop()
        return False

    def _trade(self, back: int, slack: float) -> bool:
        """Remove the one quantum instead of ``back`` that leaves least room, less than slack."""
        best: tuple[float, int] | None = None
        costs = list(self.state.costs)
        for chain in self._chains:
            quantum = next((q for q in chain if not self.removed[q]), back)
            if quantum == back or not self._may_take(quantum):
                continue
            savings = self.state.savings(quantum)
            room = self.slack([c - s for c, s in zip(costs, savings, strict=True)])
            if 0 <= room < slack and (best is None or room < best[0]):
                best = room, quantum
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

    def _approach(self, bound: int, largest: float | None = None) -> bool:
        """Remove until one bound holds; False when nothing more can go.

        Savings only shrink while quanta go, so the key of a chain only grows, and an entry of
        the heap that is found to be current is the least of all.
        """
        following = [0] * len(self._chains)
        heap: list[tuple[float, int]] = []
        for chain in range(len(self._chains)):
            key = self._next_key(chain, following, bound, largest)
            if key is not None:
                heap.append((key, chain))
        heapq.heapify(heap)
        state, limit = self.state, self.limits[bound]
        unpriced = 0
        far = self._ranks is not None and largest is None  # so that no key depends on a cost
        while state.costs[bound] > limit:
            if far and not unpriced:
                unpriced = state.steps_above(limit, bound)
                far = unpriced >= _FAR
                unpriced *= far
            if not heap:
                state.price()
                return False
            known, chain = heap[0]
            key = self._next_key(chain, following, bound, largest)
            if key is not None and key <= known:
                quantum = self._chains[chain][following[chain]]
                if self._may_take(quantum):
                    self._take(quantum, priced=not unpriced)
                    if unpriced:
                        unpriced -= 1
                        if not unpriced:
                            state.price()
                elif quantum in self._quanta.gates or self._at_floor(quantum):
                    following[chain] = len(self._chains[chain])
                following[chain] += 1
                key = self._next_key(chain, following, bound, largest)
            if key is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (key, chain))
        return True

    def _next_key(
        self, chain: int, following: list[int], bound: int, largest: float | None
    ) -> float | None:
        """Priority of the next quantum that can leave the chain; None when there is none."""
        ids = self._chains[chain]
        at = following[chain]
        while at < len(ids):
            quantum = ids[at]
            if not self.removed[quantum]:
                key = self._key(chain, at, bound, largest)
                if key is not None:
                    following[chain] = at
                    return key
                if quantum in self._quanta.gates:
                    break
            at += 1
        following[chain] = len(ids)
        return None

    def _key(self, chain: int, at: int, bound: int, largest: float | None) -> float | None:
        """Score per saving, or the rank; None for a quantum that saves nothing or too much."""
        quantum = self._chains[chain][at]
        if self._ranks is not None and largest is None:
            return self._ranks[chain][at]
        savings = self.state.savings(quantum)
        coarse = largest is not None and not self._is_fine(savings, largest)
        if not savings[bound] or coarse:
            return None
        if self._ranks is not None:
            return self._ranks[chain][at]
        return float(self._scores[quantum]) / savings[bound]

    def _is_fine(self, savings: Sequence[int], largest: float) -> bool:
        return all(
            saved <= largest * dense for saved, dense in zip(savings, self.dense, strict=True)
        )

    def _stopped(self) -> BudgetError:
        """What was asked, how far one gets, and which groups stand in the way."""
        asked, reached = [], []
        for name, cost, limit, dense in zip(
            self._names, self.state.costs, self.limits, self.dense, strict=True
        ):
            asked.append(f"{name} ≤ {limit} ({limit / dense:.1%} of {dense})")
            reached.append(f"{name} {cost} ({cost / dense:.1%})")
        stop = f"the floors ({self._floors.options}) stop at {', '.join(reached)}"
        left = [*self._remainders(self._worst() or 0), *tell_pins(self._graph)]
        return BudgetError(
            f"no plan reaches {' and '.join(asked)}",
            why="\n".join([f"{stop}; what is left there:", *(left or [NOTHING_THERE])]),
            fix="ask for less, lower the floors, or let more groups be pruned",
        )

    def _remainders(self, bound: int) -> list[str]:
        """The groups that hold most of a cost, and why no more of them goes."""
        name, dense = self._names[bound], self.dense[bound]
        kept = self._quanta.kept(self.removed)
        cost = self._graph.cost(name, kept)
        shares = []
        for number, group in enumerate(self._graph.groups):
            without = kept.copy()
            without[group.units] = False
            shares.append((self._graph.cost(name, without) - cost, number))
        told = []
        for share, number in sorted(shares)[:_NAMED]:
            group = self._graph.groups[number]
            keeps = f"keeps {self._left[number]} of {group.size} units"
            reason = self._quanta.untouched.get(group.name, keeps)
            told.append(f"{group.name}: {reason}, {-share / dense:.1%} of the dense {name}")
        if len(shares) > _NAMED:
            told.append(f"and {len(shares) - _NAMED} groups more")
        return told
