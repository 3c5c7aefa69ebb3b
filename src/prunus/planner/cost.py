"""Exact costs, kept current while quanta are removed and put back.

A *quantum* is a set of units that go together, so it is what a step of the planner removes.  A
labelled dim is cut where a position loses one of its units: a position that only one quantum can
take is counted once and for all, one that several could take (head × dim) keeps the number of
those that are gone.  Quanta that take equally many positions of the same dims are of one *kind*
and share what their removal saves, until a width on which that depends changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Label
from prunus.graph.constraints import Nonempty
from prunus.graph.coupling import CouplingGraph
from prunus.graph.polynomial import Polynomial

Ints = NDArray[np.int64]
Exact = NDArray[Any]
"""int64, or Python integers where a cost could overflow."""

_OVERFLOW = 2**62


@dataclass(eq=False, slots=True)
class _Reach:
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
        the dims that only have to stay nonempty.
    """

    def __init__(self, graph: CouplingGraph, names: Sequence[str], owner: Ints) -> None:
        labels = _watched(graph)
        polynomials = self._polynomials = [graph.costs[name] for name in names]
        self._dims = len(labels)
        self.widths: Exact = np.array([len(label) for label in labels] + [1], dtype=np.int64)
        if any(_bound(p, self.widths) >= _OVERFLOW for p in polynomials):
            self.widths = self.widths.astype(object)
        self.costs = [p(self.widths[: self._dims]) for p in polynomials]
        self._count = int(owner.max(initial=0))
        self._tables = [_table(p, self._dims, self.widths.dtype) for p in polynomials]
        self._seen_by = [_index(table, self._dims) for _, table in self._tables]
        self._reaches: dict[bytes, _Reach] = {}
        self._read_labels(labels, owner)
        self._form_kinds()
        self._layouts: dict[int, tuple[Exact, Ints, _Reach]] = {}
        self._memo: tuple[int, Exact, _Reach] | None = None

    def kind(self, quantum: int) -> int:
        """Id that quanta share which always save the same; −1 for one of no kind."""
        return self._kind[quantum]

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

    def steps_above(self, limit: int, index: int) -> int:
        """How many quanta may go, whichever they are, with a cost still above its limit.

        Savings only shrink while quanta go, so none of them saves more than the best does now.
        """
        if not self._kinds or -1 in self._kind[1:]:
            return 0
        best = max(self._difference(*kind)[index] for kind in self._kinds)
        return max(0, (self.costs[index] - limit - 1) // best) if best else 0

    def remove_unpriced(self, quantum: int) -> None:
        """Take a quantum out, and leave the costs for :meth:`price`."""
        loss, reach = self._kinds[self._kind[quantum]]
        self.widths[reach.widths] -= loss[:-1]

    def price(self) -> None:
        """Bring the costs up to date with the widths."""
        widths = self.widths[: self._dims]
        self.costs = [int(polynomial(widths)) for polynomial in self._polynomials]
        self._dirty[:] = True
        self._memo = None

    def restore(self, quantum: int) -> None:
        """Put a quantum back that was removed."""
        loss, reach = self._loss(quantum, gone=1)
        saved = self._difference(-loss, reach)
        self._move(quantum, saved, -loss, reach, -1)

    def _move(
        self, quantum: int, saved: tuple[int, ...], loss: Exact, reach: _Reach, sign: int
    ) -> None:
        for index, amount in enumerate(saved):
            self.costs[index] -= amount
        self.widths[reach.widths] -= loss[:-1]
        if self._kind[quantum] < 0:
            self._gone[self._shared_of(quantum)] += sign
        if reach.stale is None:
            reach.stale = np.unique(_joined(self._dependents[int(w)] for w in reach.widths))
        self._dirty[reach.stale] = True
        self._memo = None

    def _difference(self, loss: Exact, reach: _Reach) -> tuple[int, ...]:
        """Cost now minus cost with ``loss`` positions less."""
        found = []
        for constants, dims, places in reach.terms:
            now = self.widths[dims]
            then = now - loss[places]
            found.append(int((constants * (now.prod(axis=1) - then.prod(axis=1))).sum()))
        return tuple(found)

    def _loss(self, quantum: int, gone: int = 0) -> tuple[Exact, _Reach]:
        """Positions that hang on the quantum alone, per width of its reach and a 0 at the end.

        ``gone`` is how often the quantum itself has been counted at its shared positions.
        """
        kind = self._kind[quantum]
        if kind >= 0:
            return self._kinds[kind]
        if gone == 0 and self._memo is not None and self._memo[0] == quantum:
            return self._memo[1:]
        fixed, places, reach = self._layout(quantum)
        hanging = places[self._gone[self._shared_of(quantum)] == gone]
        loss = fixed + np.bincount(hanging, minlength=len(fixed))
        if gone == 0:
            self._memo = quantum, loss, reach
        return loss, reach

    def _layout(self, quantum: int) -> tuple[Exact, Ints, _Reach]:
        """For a quantum of no kind: its certain loss, and whose width each shared position is."""
        if quantum not in self._layouts:
            lone, times = self._lone_of(quantum)
            dims = self._shared_dim[self._shared_of(quantum)]
            reach = self._reach(np.union1d(lone, dims))
            fixed: Exact = np.zeros(len(reach.widths) + 1, dtype=self.widths.dtype)
            fixed[np.searchsorted(reach.widths, lone)] = times
            self._layouts[quantum] = fixed, np.searchsorted(reach.widths, dims), reach
        return self._layouts[quantum]

    def _lone_of(self, quantum: int) -> tuple[Ints, Ints]:
        part = slice(self._lone_start[quantum], self._lone_start[quantum + 1])
        return self._lone[part, 0], self._lone[part, 1]

    def _shared_of(self, quantum: int) -> Ints:
        return self._shared[self._shared_start[quantum] : self._shared_start[quantum + 1]]

    def _read_labels(self, labels: Sequence[Label], owner: Ints) -> None:
        """Tell the positions that hang on one quantum from those that hang on several."""
        lone: list[Ints] = []
        takers: list[Ints] = []
        positions: list[Ints] = []
        dims: list[Ints] = []
        total = 0
        for dim, label in enumerate(labels):
            rows = np.sort(owner[label], axis=1)
            rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = 0
            several = (rows > 0).sum(axis=1)
            single = rows[several == 1].max(axis=1, initial=0)
            lone.append(single * self._dims + dim)
            rows = rows[several > 1]
            row, column = np.nonzero(rows)
            takers.append(rows[row, column])
            positions.append(row + total)
            dims.append(np.full(len(rows), dim))
            total += len(rows)
        code, times = np.unique(_joined(lone), return_counts=True)
        ids = np.arange(self._count + 2)
        self._lone = np.stack([code % max(1, self._dims), times], axis=1)
        self._lone_start = np.searchsorted(code // max(1, self._dims), ids).tolist()
        taker, position = _joined(takers), _joined(positions)
        order = np.argsort(taker, kind="stable")
        self._shared = position[order]
        self._shared_start = np.searchsorted(taker[order], ids).tolist()
        self._shared_dim = _joined(dims)
        self._gone = np.zeros(total, dtype=np.int32)

    def _form_kinds(self) -> None:
        """Number the kinds, and note on which widths the savings of each depend."""
        self._kinds: list[tuple[Exact, _Reach]] = []
        self._kind = [-1] * (self._count + 1)
        number: dict[bytes, int] = {}
        raw = self._lone.tobytes()
        width = self._lone.itemsize * 2
        for quantum in range(1, self._count + 1):
            if self._shared_start[quantum] != self._shared_start[quantum + 1]:
                continue
            key = raw[self._lone_start[quantum] * width : self._lone_start[quantum + 1] * width]
            kind = number.setdefault(key, len(self._kinds))
            self._kind[quantum] = kind
            if kind == len(self._kinds):
                lone, times = self._lone_of(quantum)
                self._kinds.append(
                    (np.append(times, 0).astype(self.widths.dtype), self._reach(lone))
                )
        self._saved: list[tuple[int, ...]] = [()] * len(self._kinds)
        self._dirty = np.ones(len(self._kinds), dtype=np.bool_)
        found: list[list[int]] = [[] for _ in range(self._dims)]
        for kind, (_, reach) in enumerate(self._kinds):
            for dim in _depends_on(reach, self._dims).tolist():
                found[dim].append(kind)
        self._dependents = [np.array(kinds, dtype=np.int64) for kinds in found]

    def _reach(self, widths: Ints) -> _Reach:
        key = widths.tobytes()
        if key not in self._reaches:
            place = np.full(self._dims + 1, len(widths), dtype=np.int64)
            place[widths] = np.arange(len(widths))
            terms = []
            for (constants, table), seen_by in zip(self._tables, self._seen_by, strict=True):
                rows = np.unique(_joined(seen_by[int(w)] for w in widths))
                terms.append((constants[rows], table[rows], place[table[rows]]))
            self._reaches[key] = _Reach(widths, tuple(terms))
        return self._reaches[key]


def _watched(graph: CouplingGraph) -> list[Label]:
    """The dims that the costs speak of, then whatever else has to keep a position."""
    labels = list(graph.width_labels)
    seen = {(label.shape, label.tobytes()) for label in labels}
    others = [c.label for c in graph.constraints if isinstance(c, Nonempty)]
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


def _depends_on(reach: _Reach, dims: int) -> Ints:
    """Widths that change what is saved: all of a monomial but the only one that loses."""
    found = []
    for _, table, places in reach.terms:
        loses = places < len(reach.widths)
        others = ~loses | (loses.sum(axis=1, keepdims=True) > 1)
        found.append(table[others])
    widths = np.unique(_joined(found))
    return widths[widths < dims]


def _joined(parts: Iterable[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
