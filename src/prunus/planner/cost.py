"""Exact costs, kept current while quanta are removed and put back.

A *quantum* is a set of units that are removed together, in one step of the planner.  A
labelled dim is cut where a position loses one of its units: a position that only one quantum can
take is counted once and for all, one that several could take (head × dim) keeps the number of
those that are gone.  Quanta that take equally many positions of the same dims are of one *kind*
and share what their removal saves, until a width on which that depends changes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from prunus.graph.axis import Label, Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import AtLeast
from prunus.graph.polynomial import Monomial, Polynomial

Ints = NDArray[np.int64]
Exact = NDArray[Any]
"""int64, or Python integers where a cost could overflow."""

_OVERFLOW = 2**62


def takers_of(label: Label, owner: Ints) -> tuple[Ints, Ints]:
    """Owners at every position, ascending and each once after zeros, and how many they are.

    >>> takers_of(np.array([[1, 2], [3, 0]]), np.array([0, 5, 5, 7]))
    (array([[0, 5],
           [0, 7]]), array([1, 1]))
    """
    found = np.sort(owner[label], axis=1)
    found[:, 1:][found[:, 1:] == found[:, :-1]] = 0
    found.sort(axis=1)
    return found, (found > 0).sum(axis=1)


class Positions:
    """The positions of some dims, by the quanta without which they can't be kept.

    A position that one quantum alone can take is *lone*, and only counted; of one that several
    could take (head × dim) each taker is noted.

    Parameters
    ----------
    labels
        Of the dims.
    owner
        The quantum of every unit, 0 for units that are always kept.

    Attributes
    ----------
    full
        Positions of every dim while nothing is gone, shape ``(dims,)``.
    lone
        How many positions of each dim a quantum takes alone, shape ``(quanta + 1, dims)``.
    shared
        Which positions a quantum could take as well as others, ``(quanta + 1, positions)``.
    shared_dim
        The dim of every shared position.
    """

    def __init__(self, labels: Sequence[Label], owner: Ints) -> None:
        lone, dims, takers, positions, shared_dims = ([np.zeros(0, np.int64)] for _ in range(5))
        total = 0
        for dim, label in enumerate(labels):
            rows, several = takers_of(label, owner)
            single = rows[several == 1].max(axis=1, initial=0)
            lone.append(single)
            dims.append(np.full(len(single), dim))
            rows = rows[several > 1]
            row, column = np.nonzero(rows)
            takers.append(rows[row, column])
            positions.append(row + total)
            shared_dims.append(np.full(len(rows), dim))
            total += len(rows)
        count = int(owner.max(initial=0))
        self.full = np.array([len(label) for label in labels], dtype=np.int64)
        self.lone = _matrix(np.concatenate(lone), np.concatenate(dims), count, len(labels))
        self.shared = _matrix(np.concatenate(takers), np.concatenate(positions), count, total)
        self.shared_dim = np.concatenate(shared_dims)

    def lone_of(self, quantum: int) -> tuple[Ints, Ints]:
        """Dims, ascending, and how many positions of each the quantum takes alone."""
        own = slice(*self.lone.indptr[quantum : quantum + 2])
        return self.lone.indices[own].astype(np.int64), self.lone.data[own]

    def shared_of(self, quantum: int) -> Ints:
        """Positions that the quantum could take as well as others."""
        found: Ints = self.shared.indices[slice(*self.shared.indptr[quantum : quantum + 2])]
        return found

    def dims_shared(self, quantum: int) -> Ints:
        """The dims of these positions."""
        return self.shared_dim[self.shared_of(quantum)]

    def gone(self, removed: Mask) -> Ints:
        """How many of its takers are gone, for every shared position."""
        return np.asarray(removed.astype(np.int64) @ self.shared)

    def widths(self, removed: Mask) -> Ints:
        """Positions of every dim that are left without the quanta of a mask."""
        alone = removed.astype(np.int64) @ self.lone
        dead = self.shared_dim[self.gone(removed) > 0]
        return np.asarray(self.full - alone - np.bincount(dead, minlength=len(self.full)))

    def orders(self, chains: Sequence[Ints], gates: Collection[int]) -> list[Ints]:
        """The order of each chain in which what a dim needs at least is removed last.

        (A dim that is wholly the chain's keeps a position: that of its most important quantum.)
        ``gates`` keep their places.
        """
        dims = len(self.full)
        home = np.full(self.lone.shape[0], -1)
        place = np.zeros_like(home)
        for n, chain in enumerate(chains):
            home[chain], place[chain] = n, np.arange(len(chain))
        entries = self.lone.tocoo()
        inside = home[entries.row] >= 0
        quantum, dim, times = (a[inside] for a in (entries.row, entries.col, entries.data))
        pairs, which = np.unique(home[quantum] * dims + dim, return_inverse=True)
        taken, last = np.zeros((2, len(pairs)), dtype=np.int64)
        np.add.at(taken, which, times)
        np.maximum.at(last, which, place[quantum])
        whole = taken == self.full[pairs % dims]
        late = [np.zeros(len(chain), dtype=np.bool_) for chain in chains]
        for n, at in zip(pairs[whole] // dims, last[whole], strict=True):
            late[n][at] = at > 0 or int(chains[n][0]) not in gates
        return [np.argsort(own, kind="stable") for own in late]


def _matrix(rows: Ints, columns: Ints, count: int, width: int) -> Any:
    """How often a quantum stands with a column, without quantum 0."""
    real = rows > 0
    ones = np.ones(int(real.sum()), dtype=np.int64)
    found = csr_array((ones, (rows[real], columns[real])), shape=(count + 1, width))
    found.sum_duplicates()
    return found


@dataclass(eq=False, slots=True)
class Reach:
    """The monomials that see some widths, given by ascending ids.

    ``terms`` has for each cost the constants, the widths of every monomial, and for each of these
    its place in ``widths`` (or ``len(widths)`` if it isn't one of them); ``stale`` the kinds whose
    savings change with these widths.
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
        The quantum of every unit, shape ``(unit_count + 1,)``; 0 for units that are always kept.
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
        self._polynomials = [graph.costs[name] for name in names]
        self._dims = len(labels)
        self.widths: Exact = np.array([len(label) for label in labels] + [1], dtype=np.int64)
        if any(_magnitude(p)(self.widths) >= _OVERFLOW for p in self._polynomials):
            self.widths = self.widths.astype(object)
        self.costs = [p(self.widths) for p in self._polynomials]
        self._tables = [_table(p, self._dims, self.widths.dtype) for p in self._polynomials]
        self._reaches: dict[bytes, Reach] = {}
        self.positions = Positions(labels, owner)
        self._gone = np.zeros(len(self.positions.shared_dim), dtype=np.int64)
        self._form_kinds()
        self._layouts: dict[int, tuple[Exact, Ints, Reach]] = {}
        self._memo: tuple[int, Exact, Reach] | None = None

    @property
    def empty(self) -> bool:
        """Whether a dim has no position left."""
        return bool((self.widths <= 0).any())

    @property
    def constants(self) -> list[Exact]:
        """Of all monomials, cost by cost."""
        return [constants for constants, _ in self._tables]

    def likeness(self, chain: Ints) -> Ints:
        """Equal numbers for quanta of a chain that save equally much in a model that is whole.

        Quanta of no kind are alike if they take as many positions of the same dims, alone and
        with others; where two of them could take one position, none is like another.
        """
        found = np.array([self._kind[quantum] for quantum in chain.tolist()])
        positions, odd = self.positions, chain[found < 0]
        shared = positions.shared[odd].indices
        apart = len(np.unique(shared)) == len(shared)
        keys: list[Any] = odd.tolist()
        if apart:
            taken = ((*positions.lone_of(n), positions.dims_shared(n)) for n in keys)
            keys = [tuple(part.tobytes() for part in parts) for parts in taken]
        known: dict[Any, int] = {}
        found[found < 0] = [-1 - known.setdefault(key, len(known)) for key in keys]
        return found

    def curve(self, quantum: int, count: int) -> tuple[NDArray[np.float64], Mask]:
        """By how much the costs change with 0 … ``count`` quanta like this one less.

        Also returns whether every dim keeps a position then.  Positions that several quanta could
        take are taken to be there.
        Shapes are ``(costs, count + 1)`` and ``(count + 1,)``.
        """
        fixed, places, reach = self._layout(quantum)
        loss = (fixed + np.bincount(places, minlength=len(fixed))).astype(np.float64)
        steps = np.arange(count + 1)[:, None]
        found = []
        for constants, table, own in reach.terms:
            now = self.widths[table].astype(np.float64)
            left = np.maximum(now - steps[:, :, None] * loss[own], 0).prod(axis=2)
            found.append(((left - now.prod(axis=1)) * constants.astype(np.float64)).sum(axis=1))
        possible = (self.widths[reach.widths] > steps * loss[:-1]).all(axis=1)
        return np.array(found), np.asarray(possible, dtype=np.bool_)

    def savings(self, quantum: int) -> tuple[int, ...]:
        """What removing the quantum now saves, for every cost."""
        kind = self._kind[quantum]
        if kind < 0:
            return self._difference(*self._loss(quantum))
        if self._dirty[kind]:
            self._saved[kind] = self._difference(*self._kinds[kind])
            self._dirty[kind] = False
        return self._saved[kind]

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
        self._move(quantum, saved, *self._loss(quantum), 1)

    def restore(self, quantum: int) -> None:
        """Put a quantum back that was removed."""
        loss, reach = self._loss(quantum, gone=1)
        self._move(quantum, self._difference(-loss, reach), -loss, reach, -1)

    def assign(self, removed: Mask) -> None:
        """Let exactly the quanta of a mask be gone, shape ``(quanta + 1,)``."""
        self.widths[: self._dims] = self.positions.widths(removed)
        self._gone = self.positions.gone(removed)
        self.costs = [polynomial(self.widths) for polynomial in self._polynomials]
        self._dirty[:] = True
        self._memo = None

    def _move(
        self, quantum: int, saved: tuple[int, ...], loss: Exact, reach: Reach, sign: int
    ) -> None:
        for index, amount in enumerate(saved):
            self.costs[index] -= amount
        self.widths[reach.widths] -= loss[:-1]
        if self._kind[quantum] < 0:
            self._gone[self.positions.shared_of(quantum)] += sign
        if reach.stale is None:
            reach.stale = np.flatnonzero(self._depends[:, reach.widths].any(axis=1))
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
        """What a quantum takes alone, and of which width each of its shared positions is."""
        if quantum not in self._layouts:
            lone, times = self.positions.lone_of(quantum)
            dims = self.positions.dims_shared(quantum)
            reach = self._reach(np.union1d(lone, dims))
            fixed: Exact = np.zeros(len(reach.widths) + 1, dtype=self.widths.dtype)
            fixed[np.searchsorted(reach.widths, lone)] = times
            self._layouts[quantum] = fixed, np.searchsorted(reach.widths, dims), reach
        return self._layouts[quantum]

    def _form_kinds(self) -> None:
        """Number the kinds, and note on which widths the savings of each depend."""
        self._kinds: list[tuple[Exact, Reach]] = []
        self._kind = [-1] * self.positions.lone.shape[0]
        number: dict[bytes, int] = {}
        lone, shared = self.positions.lone, np.diff(self.positions.shared.indptr).tolist()
        raw = memoryview(np.stack([lone.indices, lone.data], axis=1, dtype=np.int64).tobytes())
        starts = (16 * lone.indptr.astype(np.int64)).tolist()
        for quantum in range(1, len(self._kind)):
            if not shared[quantum]:
                key = bytes(raw[starts[quantum] : starts[quantum + 1]])
                self._kind[quantum] = kind = number.setdefault(key, len(self._kinds))
                if kind == len(self._kinds):
                    dims, times = self.positions.lone_of(quantum)
                    loss = np.append(times, 0).astype(self.widths.dtype)
                    self._kinds.append((loss, self._reach(dims)))
        self._saved: list[tuple[int, ...]] = [()] * len(self._kinds)
        self._dirty = np.ones(len(self._kinds), dtype=np.bool_)
        self._depends = np.zeros((len(self._kinds), self._dims + 1), dtype=np.bool_)
        for kind, (_, reach) in enumerate(self._kinds):
            for _, table, places in reach.terms:
                # Savings depend on all widths of a monomial but the only one that loses.
                loses = places < len(reach.widths)
                self._depends[kind, table[~loses | (loses.sum(axis=1, keepdims=True) > 1)]] = True

    def _reach(self, widths: Ints) -> Reach:
        """The monomials that see some widths, given by ascending ids."""
        key = widths.tobytes()
        if key not in self._reaches:
            place = np.full(self._dims + 1, len(widths), dtype=np.int64)
            place[widths] = np.arange(len(widths))
            terms = []
            for constants, table in self._tables:
                seen = (place[table] < len(widths)).any(axis=1)
                terms.append((constants[seen], table[seen], place[table[seen]]))
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


def _magnitude(polynomial: Polynomial) -> Polynomial:
    """No sum or product on the way to the polynomial's value is larger than this one's."""
    terms = tuple(Monomial(abs(term.constant), term.widths) for term in polynomial.terms)
    return Polynomial(abs(polynomial.fixed), terms)


def _table(polynomial: Polynomial, dims: int, dtype: np.dtype[Any]) -> tuple[Exact, Ints]:
    """Constants, and a row of widths per monomial, filled up with the width that is always 1."""
    terms = polynomial.terms
    table = np.full((len(terms), max((len(t.widths) for t in terms), default=0)), dims)
    for row, term in enumerate(terms):
        table[row, : len(term.widths)] = term.widths
    return np.array([term.constant for term in terms], dtype=dtype), table
