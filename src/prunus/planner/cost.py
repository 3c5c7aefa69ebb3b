"""Exact costs, kept current while quanta are removed and put back.

A *quantum* is a set of units that are removed together, in one step of the planner.  A
labelled dim is cut where a position loses one of its units: a position that only one quantum can
take is counted once and for all, one that several could take (head × dim) keeps the number of
those that are gone.  Quanta that take equally many positions of the same dims are of one *kind*
and share what their removal saves, until a width on which that depends changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Label, Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import AtLeast
from prunus.graph.polynomial import Polynomial
from prunus.planner.positions import joined, read_positions

Ints = NDArray[np.int64]
Exact = NDArray[Any]
"""int64, or Python integers where a cost could overflow."""

_OVERFLOW = 2**62


@dataclass(eq=False, slots=True)
class Reach:
    """The monomials that see some widths.

    Attributes
    ----------
    widths
        Ids of the widths, ascending.
    terms
        For each cost: the constants, the widths of every monomial, and for each of these its
        place in ``widths`` (or ``len(widths)`` if it isn't one of them).
    stale
        The kinds whose savings change with these widths.
    """

    widths: Ints
    terms: tuple[tuple[Exact, Ints, Ints], ...]
    stale: Ints | None = None


class CostState:
    """Widths and costs of a graph from which quanta are removed.

    Parameters
    ----------
    graph
        Whose costs are counted.
    names
        Which of them.
    owner
        The quantum of every unit, shape ``(unit_count + 1,)``; 0 for units that always stay.
        Quanta have the ids 1 … ``owner.max()``.

    Attributes
    ----------
    costs
        The present costs, in the order of ``names``.
    widths
        Kept positions of every dim that is watched: those of ``graph.width_labels`` first, then
        the dims that only have to stay nonempty; at the end a 1, which is the width of no dim.
    positions
        Which quanta take which positions of these dims.
    """

    def __init__(self, graph: CouplingGraph, names: Sequence[str], owner: Ints) -> None:
        labels = _watched(graph)
        polynomials = self._polynomials = [graph.costs[name] for name in names]
        self._dims = len(labels)
        self.widths: Exact = np.array([len(label) for label in labels] + [1], dtype=np.int64)
        if any(_bound(p, self.widths) >= _OVERFLOW for p in polynomials):
            self.widths = self.widths.astype(object)
        self.costs = [p(self.widths[: self._dims]) for p in polynomials]
        self._tables = [_table(p, self._dims, self.widths.dtype) for p in polynomials]
        self._seen_by = [_index(table, self._dims) for _, table in self._tables]
        self._reaches: dict[bytes, Reach] = {}
        self.positions = read_positions(labels, owner)
        self._gone = np.zeros(len(self.positions.shared_dim), dtype=np.int64)
        self._form_kinds()
        self._layouts: dict[int, tuple[Exact, Ints, Reach]] = {}
        self._memo: tuple[int, Exact, Reach] | None = None

    @property
    def empty(self) -> list[int]:
        """Dims that have no position left."""
        found: list[int] = np.flatnonzero(self.widths <= 0).tolist()
        return found

    @property
    def constants(self) -> list[Exact]:
        """Of all monomials, cost by cost."""
        return [constants for constants, _ in self._tables]

    def likeness(self, chain: Ints) -> Ints:
        """Equal numbers for quanta of a chain that save equally much in a model that is whole.

        Quanta of no kind are alike if they take as many positions of the same dims, alone and
        with others; where two of them could take one position, none is like another.
        """
        found = self._kind_of[chain].copy()
        odd = np.flatnonzero(found < 0)
        positions = self.positions
        shared = joined(positions.shared_of(int(quantum)) for quantum in chain[odd])
        apart = len(np.unique(shared)) == len(shared)
        known: dict[Any, int] = {}
        for at, quantum in zip(odd.tolist(), chain[odd].tolist(), strict=True):
            key: Any = quantum
            if apart:
                lone = [part.tobytes() for part in positions.lone_of(quantum)]
                key = *lone, positions.shared_dim[positions.shared_of(quantum)].tobytes()
            found[at] = -1 - known.setdefault(key, len(known))
        return np.asarray(found)

    def curve(self, quantum: int, count: int) -> tuple[NDArray[np.float64], Mask]:
        """By how much the costs change with 0 … ``count`` quanta like this one less.

        Also returns whether every dim keeps a position then.  Positions that several quanta could
        take are taken to be there.

        Returns
        -------
        tuple
            Of shape ``(costs, count + 1)`` and ``(count + 1,)``.
        """
        lone, times = self.positions.lone_of(quantum)
        shared = self.positions.shared_dim[self.positions.shared_of(quantum)]
        dims = np.union1d(lone, shared)
        loss = np.zeros(len(dims) + 1)
        np.add.at(loss, np.searchsorted(dims, lone), times)
        np.add.at(loss, np.searchsorted(dims, shared), 1)
        steps = np.arange(count + 1)[:, None]
        found = []
        for constants, table, places in self.reach(dims).terms:
            now, lost = self.widths[table].astype(np.float64), loss[places]
            left = np.maximum(now - steps[:, :, None] * lost, 0).prod(axis=2)
            found.append(((left - now.prod(axis=1)) * constants.astype(np.float64)).sum(axis=1))
        possible = (self.widths[dims] > steps * loss[:-1]).all(axis=1)
        return np.array(found), np.asarray(possible, dtype=np.bool_)

    def savings(self, quantum: int) -> tuple[int, ...]:
        """What removing the quantum now saves, for every cost."""
        kind = self._kind[quantum]
        if kind >= 0:
            if self._dirty[kind]:
                self._saved[kind] = self._difference(*self._kinds[kind])
                self._dirty[kind] = False
            return self._saved[kind]
        return self._difference(*self._loss(quantum))

    def expenses(self, quantum: int) -> tuple[int, ...]:
        """What putting the removed quantum back now costs, for every cost."""
        loss, reach = self._loss(quantum, gone=1)
        return tuple(-saved for saved in self._difference(-loss, reach))

    def removable(self, quantum: int) -> bool:
        """Whether every dim would keep a position."""
        loss, reach = self._loss(quantum)
        return not (self.widths[reach.widths] <= loss[:-1]).any()

    def remove(self, quantum: int) -> None:
        """Take the quantum out."""
        saved = self.savings(quantum)
        loss, reach = self._loss(quantum)
        self._move(quantum, saved, loss, reach, 1)

    def price(self) -> None:
        """Bring the costs up to date with the widths."""
        widths = self.widths[: self._dims]
        self.costs = [int(polynomial(widths)) for polynomial in self._polynomials]
        self._dirty[:] = True
        self._memo = None

    def assign(self, removed: Mask) -> None:
        """Let exactly the quanta of a mask be gone, shape ``(quanta + 1,)``."""
        self.widths[: self._dims] = self.positions.widths(removed)
        self._gone = self.positions.gone(removed)
        self.price()

    def restore(self, quantum: int) -> None:
        """Put a quantum back that was removed."""
        loss, reach = self._loss(quantum, gone=1)
        saved = self._difference(-loss, reach)
        self._move(quantum, saved, -loss, reach, -1)

    def _move(
        self, quantum: int, saved: tuple[int, ...], loss: Exact, reach: Reach, sign: int
    ) -> None:
        for index, amount in enumerate(saved):
            self.costs[index] -= amount
        self.widths[reach.widths] -= loss[:-1]
        if self._kind[quantum] < 0:
            self._gone[self.positions.shared_of(quantum)] += sign
        if reach.stale is None:
            reach.stale = np.unique(joined(self._dependents[int(w)] for w in reach.widths))
        self._dirty[reach.stale] = True
        self._memo = None

    def _difference(self, loss: Exact, reach: Reach) -> tuple[int, ...]:
        """Cost now minus cost with ``loss`` positions less."""
        found = []
        for constants, dims, places in reach.terms:
            now = self.widths[dims]
            then = now - loss[places]
            found.append(int((constants * (now.prod(axis=1) - then.prod(axis=1))).sum()))
        return tuple(found)

    def _loss(self, quantum: int, gone: int = 0) -> tuple[Exact, Reach]:
        """Positions that hang on the quantum alone, per width of its reach and a 0 at the end.

        ``gone`` is how often the quantum itself has been counted at its shared positions.
        """
        kind = self._kind[quantum]
        if kind >= 0:
            return self._kinds[kind]
        if gone == 0 and self._memo is not None and self._memo[0] == quantum:
            return self._memo[1:]
        fixed, places, reach = self._layout(quantum)
        hanging = places[self._gone[self.positions.shared_of(quantum)] == gone]
        loss = fixed + np.bincount(hanging, minlength=len(fixed))
        if gone == 0:
            self._memo = quantum, loss, reach
        return loss, reach

    def _layout(self, quantum: int) -> tuple[Exact, Ints, Reach]:
        """For a quantum of no kind: its certain loss, and whose width each shared position is."""
        if quantum not in self._layouts:
            lone, times = self.positions.lone_of(quantum)
            dims = self.positions.shared_dim[self.positions.shared_of(quantum)]
            reach = self.reach(np.union1d(lone, dims))
            fixed: Exact = np.zeros(len(reach.widths) + 1, dtype=self.widths.dtype)
            fixed[np.searchsorted(reach.widths, lone)] = times
            self._layouts[quantum] = fixed, np.searchsorted(reach.widths, dims), reach
        return self._layouts[quantum]

    def _form_kinds(self) -> None:
        """Number the kinds, and note on which widths the savings of each depend."""
        self._kinds: list[tuple[Exact, Reach]] = []
        self._kind = [-1] * (self.positions.count + 1)
        number: dict[bytes, int] = {}
        starts, shared = self.positions.lone_start, self.positions.shared_start
        rows = np.ascontiguousarray(self.positions.lone[:, 1:])
        raw = memoryview(rows.tobytes())
        width = rows.itemsize * 2
        for quantum in range(1, self.positions.count + 1):
            if shared[quantum] != shared[quantum + 1]:
                continue
            key = bytes(raw[starts[quantum] * width : starts[quantum + 1] * width])
            kind = number.setdefault(key, len(self._kinds))
            self._kind[quantum] = kind
            if kind == len(self._kinds):
                lone, times = self.positions.lone_of(quantum)
                loss = np.append(times, 0).astype(self.widths.dtype)
                self._kinds.append((loss, self.reach(lone)))
        self._kind_of = np.array(self._kind)
        self._saved: list[tuple[int, ...]] = [()] * len(self._kinds)
        self._dirty = np.ones(len(self._kinds), dtype=np.bool_)
        found: list[list[int]] = [[] for _ in range(self._dims)]
        for kind, (_, reach) in enumerate(self._kinds):
            for dim in _depends_on(reach, self._dims).tolist():
                found[dim].append(kind)
        self._dependents = [np.array(kinds, dtype=np.int64) for kinds in found]

    def reach(self, widths: Ints) -> Reach:
        """The monomials that see some widths, given by ascending ids."""
        key = widths.tobytes()
        if key not in self._reaches:
            place = np.full(self._dims + 1, len(widths), dtype=np.int64)
            place[widths] = np.arange(len(widths))
            terms = []
            for (constants, table), seen_by in zip(self._tables, self._seen_by, strict=True):
                rows = np.unique(joined(seen_by[int(w)] for w in widths))
                terms.append((constants[rows], table[rows], place[table[rows]]))
            self._reaches[key] = Reach(widths, tuple(terms))
        return self._reaches[key]


def _watched(graph: CouplingGraph) -> list[Label]:
    """The dims that the costs speak of, then whatever else has to keep a position."""
    labels = list(graph.width_labels)
    seen = {(label.shape, label.tobytes()) for label in labels}
    others = [c.label for c in graph.constraints if isinstance(c, AtLeast)]
    for label in [*graph.labels.values(), *others]:
        key = (label.shape, label.tobytes())
        if key not in seen:
            seen.add(key)
            labels.append(label)
    return labels


def _bound(polynomial: Polynomial, widths: Exact) -> int:
    """No sum or product on the way to the polynomial's value is larger than this."""
    total = abs(polynomial.fixed)
    for term in polynomial.terms:
        product = abs(term.constant)
        for index in term.widths:
            product *= int(widths[index])
        total += product
    return total


def _table(polynomial: Polynomial, dims: int, dtype: np.dtype[Any]) -> tuple[Exact, Ints]:
    """Constants, and a row of widths per monomial, filled up with the width that is always 1."""
    terms = polynomial.terms
    table = np.full((len(terms), max((len(t.widths) for t in terms), default=0)), dims)
    for row, term in enumerate(terms):
        table[row, : len(term.widths)] = term.widths
    return np.array([term.constant for term in terms], dtype=dtype), table


def _index(table: Ints, dims: int) -> list[Ints]:
    """For every width the monomials in which it appears."""
    found: list[list[int]] = [[] for _ in range(dims + 1)]
    for row, widths in enumerate(table.tolist()):
        for dim in set(widths):
            found[dim].append(row)
    return [np.array(rows, dtype=np.int64) for rows in found[:dims]]


def _depends_on(reach: Reach, dims: int) -> Ints:
    """Widths that change what is saved: all of a monomial but the only one that loses."""
    found = []
    for _, table, places in reach.terms:
        loses = places < len(reach.widths)
        others = ~loses | (loses.sum(axis=1, keepdims=True) > 1)
        found.append(table[others])
    widths = np.unique(joined(found))
    return widths[widths < dims]
