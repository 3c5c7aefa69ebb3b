"""The axis algebra: atoms, their definitions, and the labels made of them.

An *atom* is one boolean keep-variable.  Atom 0 is "always kept".  A label of a dim of size n is
an array (n, k) of atoms: position i is kept if and only if all its k atoms are.  An atom may be
*defined* as the product of two others, retroactively and everywhere: so a view of 768 channels
as 12 × 64 turns each channel's atom into (head) AND (head dim).

Every operation is sound: where the algebra can't express what an operator demands, it pins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Axis, Label
from prunus.graph.groups import Pin

Atoms = NDArray[np.int64]

MAX_FACTORS = 8
"""A label with more columns than this is pinned: nobody's model needs it, and it stays small."""

COUNT_TRIALS = 8
"""Random selections under which two dims must keep equally many positions."""

NOBODY = Axis("(inner)", 0)
TOO_DEEP = Pin(f"views nested into more than {MAX_FACTORS} factors", "view", "", "")


class Event(NamedTuple):
    """Two rows of atoms tied by an operator; ``b is None`` when they were pinned."""

    a: Atoms
    b: Atoms | None
    why: Pin


class Algebra:
    """A vectorised union-find over atoms with definitions by product.

    Attributes
    ----------
    has_definitions
        Whether any atom stands for several others.
    has_copies
        Whether any label is that of copies.

    >>> algebra, why = Algebra(), Pin("", "", "", "")
    >>> label = algebra.fresh(6)[:, None]
    >>> heads, dims = algebra.split(label, (2, 3), why)
    >>> algebra.pin(heads, why)
    >>> algebra.canonical(label)[:, 0].tolist() == dims[:, 0].tolist() * 2
    True
    """

    def __init__(self) -> None:
        self._parent = np.arange(1024, dtype=np.int64)
        self._left = np.zeros(1024, dtype=np.int64)
        self._right = np.zeros(1024, dtype=np.int64)
        self._defined = np.zeros(1024, dtype=np.bool_)
        self._copies = np.zeros(1024, dtype=np.bool_)
        self._places = np.zeros(1024, dtype=np.bool_)
        self._count = 1
        self.has_definitions = False
        self.has_copies = False
        self.events: list[Event] = []
        self.owners: list[Axis] = [Axis("always kept", 0)]
        self.starts: list[int] = [0]

    @property
    def count(self) -> int:
        """Number of atoms made so far, atom 0 included."""
        return self._count

    def fresh(self, size: int, owner: Axis = NOBODY) -> Atoms:
        """New atoms with consecutive ids, shape ``(size,)``, in the name of an axis."""
        self.owners.append(owner)
        self.starts.append(self._count)
        needed = self._count + size
        if needed > len(self._parent):
            capacity = max(needed, 2 * len(self._parent))
            grown = np.arange(capacity, dtype=np.int64)
            grown[: self._count] = self._parent[: self._count]
            self._parent = grown
            for name in ("_left", "_right", "_defined", "_copies", "_places"):
                array = np.resize(getattr(self, name), capacity)
                array[self._count :] = 0
                setattr(self, name, array)
        atoms = np.arange(self._count, needed, dtype=np.int64)
        self._count = needed
        return atoms

    def copies(self, size: int, owner: Axis = NOBODY) -> Label:
        """The label of a dim that holds nothing of its own: copies, or one number all over.

        Whatever it meets it is tied to.  Until then its atoms are no roots, so that a label which
        holds them is that of a dim that has met nothing but such dims.
        """
        own, twin = self.fresh(size, owner), self.fresh(size, owner)
        self.has_copies = True
        self._copies[twin] = True
        self._places[own] = True
        self._tie(own, twin)
        return twin[:, None]

    def copied(self, label: Label | None) -> Label | None:
        """The columns of a label that :meth:`copies` has made; None without any."""
        if label is None or not self.has_copies:
            return None
        columns = self._copies[label].any(axis=0)
        return label[:, columns] if columns.any() else None

    def pin_copies(self, label: Label, why: Pin) -> None:
        """Keep every position of copies, where anything else was tied to them."""
        others = np.flatnonzero(~(self._copies | self._places)[: self._count])[1:]
        if np.isin(self.find(label), self.find(others)).any():
            self.pin(label, why)

    def _raw(self, label: Label | None) -> Label | None:
        """The canonical label, or the label itself where it is that of copies."""
        flat = self.canonical(label)
        if flat is None or self.copied(label) is None or label is None:
            return flat
        roots = self.find(label)
        return flat if self._are_defined(roots) or not roots.all() else label

    def find(self, atoms: Atoms) -> Atoms:
        """Roots of the atoms, same shape."""
        roots = self._parent[atoms]
        while True:
            above = self._parent[roots]
            if not np.count_nonzero(above != roots):
                return roots
            roots = above

    def canonical(self, label: Label | None) -> Label | None:
        """The label in terms of roots without definition; None when every position is kept."""
        if label is None:
            return None
        roots = self.find(label)
        if label.shape[1] == 1 and not self._are_defined(roots):
            return roots if np.count_nonzero(roots) else None
        done = _compact(self._factors(list(roots.T)))
        if len(done) > MAX_FACTORS:
            for column in done:
                self._tie(column, np.zeros_like(column))
            self.events.append(Event(label.ravel(), None, TOO_DEEP))
            return None
        return np.stack(done, axis=1) if done else None

    def _are_defined(self, roots: Atoms) -> bool:
        """Whether any of them stands for several others."""
        return self.has_definitions and bool(np.count_nonzero(self._defined[roots]))

    def _factors(self, columns: list[Atoms]) -> list[Atoms]:
        """The distinct columns of atoms without definition whose product columns of roots are."""
        done: list[Atoms] = []
        while columns:
            column = columns.pop()
            defined = self._defined[column]
            if defined.any():
                columns.append(self.find(np.where(defined, self._left[column], column)))
                columns.append(self.find(np.where(defined, self._right[column], 0)))
            elif column.any() and not any(np.array_equal(column, other) for other in done):
                done.append(column)
        return done

    def unify(self, a: Label | None, b: Label | None, why: Pin) -> Label | None:
        """Demand that two dims of the same size keep the same positions; returns their label.

        A dim without label keeps everything, and so pins the other.
        """
        if a is b:
            return a
        if a is not None and b is not None:
            self._remember(a, b, why)
        joined = self._unify(a, b, why)
        both = self.copied(a) is not None and self.copied(b) is not None
        return self._raw(a) if joined is not None and both else joined

    def count_alike(self, a: Label | None, b: Label | None) -> bool:
        """Whether two dims keep equally many positions by construction, as a shuffled dim does.

        Tried on random selections; a wrong yes costs an equation that is checked again later.
        """
        first, second = self.canonical(a), self.canonical(b)
        if first is None or second is None:
            return first is second
        atoms, places = np.unique(
            np.concatenate([first.ravel(), second.ravel()]), return_inverse=True
        )
        one = places[: first.size].reshape(first.shape)
        other = places[first.size :].reshape(second.shape)
        for seed in range(COUNT_TRIALS):
            kept = (np.random.default_rng(seed).random(len(atoms)) > 0.3) | (atoms == 0)
            if kept[one].all(axis=1).sum() != kept[other].all(axis=1).sum():
                return False
        return True

    def pin(self, label: Label | None, why: Pin) -> None:
        """Keep every position for ever."""
        if label is None:
            return
        flat = self.canonical(label)
        self.events.append(Event(label.ravel(), None, why))
        if flat is not None:
            self._tie(flat.ravel(), np.zeros(flat.size, dtype=np.int64))

    def split(self, label: Label | None, sizes: tuple[int, int], why: Pin) -> list[Label | None]:
        """Labels of the two dims (a, b) into which a dim of size a·b is viewed."""
        flat = self._raw(label)
        if flat is None or label is None:
            return [None, None]
        if sizes[0] == 1:
            return [None, flat]
        if sizes[1] == 1:
            return [flat, None]
        rows: list[Atoms] = []
        cols: list[Atoms] = []
        for column in flat.T:
            table = column.reshape(sizes)
            if (table == table[:, :1]).all():
                rows.append(table[:, 0].copy())
            elif (table == table[:1]).all():
                cols.append(table[0].copy())
            else:
                row, col = self._name_parts(sizes, why)
                product = np.stack([np.repeat(row, sizes[1]), np.tile(col, sizes[0])], axis=1)
                self._remember(column[:, None], product, why)
                self._unify(column[:, None], product, why)
                rows.append(row)
                cols.append(col)
        return [np.stack(part, axis=1) if part else None for part in (rows, cols)]

    def merge(self, labels: Sequence[Label | None], sizes: Sequence[int]) -> Label | None:
        """Label of the dim into which several dims are flattened, the last one fastest."""
        total = int(np.prod(sizes))
        columns: list[Label] = []
        inner = total
        for label, size in zip(labels, sizes, strict=True):
            inner //= size
            if label is not None:
                columns.append(
                    np.tile(np.repeat(label, inner, axis=0), (total // (inner * size), 1))
                )
        return np.concatenate(columns, axis=1) if columns else None

    def cat(self, labels: Sequence[Label | None], sizes: Sequence[int]) -> Label | None:
        """Label of dims laid end to end."""
        flat = [self._raw(label) for label in labels]
        if all(label is None for label in flat):
            return None
        width = max(label.shape[1] for label in flat if label is not None)
        parts = []
        for label, size in zip(flat, sizes, strict=True):
            part = np.zeros((size, width), dtype=np.int64)
            if label is not None:
                part[:, : label.shape[1]] = label
            parts.append(part)
        return np.concatenate(parts)

    def _name_parts(self, sizes: tuple[int, int], why: Pin) -> tuple[Atoms, Atoms]:
        name = f"{why.module or 'model'} viewed as {sizes[0]}×{sizes[1]} #{len(self.starts)}"
        return self.fresh(sizes[0], Axis(name, 0)), self.fresh(sizes[1], Axis(name, 1))

    def _remember(self, a: Label, b: Label, why: Pin) -> None:
        if a.shape[1] != b.shape[1] and 1 in (a.shape[1], b.shape[1]):
            a, b = np.broadcast_arrays(a, b)
        elif a.shape[1] != b.shape[1]:
            a, b = a[:, :1], b[:, :1]
        self.events.append(Event(a.ravel(), b.ravel(), why))

    def _unify(self, a: Label | None, b: Label | None, why: Pin) -> Label | None:
        first, second = self.canonical(a), self.canonical(b)
        if first is None or second is None:
            self.pin(first if second is None else second, why)
            return None
        if first.shape == second.shape and not np.count_nonzero(first != second):
            return first
        if first.shape[1] == second.shape[1] == 1:
            self._tie(first[:, 0], second[:, 0])
            return self.canonical(a)
        self._equate_columns(list(first.T), list(second.T), why)
        return self.canonical(a)

    def _equate_columns(self, first: list[Atoms], second: list[Atoms], why: Pin) -> None:
        """Demand that products of columns are one; what can't be matched is pinned."""
        left, right = _without(first, second), _without(second, first)
        self._match(left, right)
        if len(left) == 1 and right:
            self._equate(left[0], right, why)
        elif len(right) == 1 and left:
            self._equate(right[0], left, why)
        else:
            for column in left + right:
                self.pin(column[:, None], why)

    def _match(self, left: list[Atoms], right: list[Atoms]) -> None:
        """Tie the columns that partition the positions alike, and take them off the lists."""
        if len(left) == 1 and len(right) == 1:
            return
        shapes = [_partition(column) for column in right]
        for column in list(left):
            shape = _partition(column)
            for index, other in enumerate(shapes):
                if np.array_equal(shape, other):
                    self._tie(column, right[index])
                    left[:] = [c for c in left if c is not column]
                    del right[index], shapes[index]
                    break

    def _equate(self, column: Atoms, factors: list[Atoms], why: Pin) -> None:
        """Demand keep(column) = AND of keep(factor): tie one factor, define for more."""
        column, factors = self.find(column), [self.find(factor) for factor in factors]
        if len(factors) == 1:
            self._tie(column, factors[0])
            return
        if np.intersect1d(column[column > 0], np.concatenate(factors)).size:
            for part in [column, *factors]:
                self.pin(part[:, None], why)
            return
        fixed = column == 0
        for factor in factors:
            self._tie(factor[fixed], column[fixed])
        atoms, first, inverse = np.unique(column, return_index=True, return_inverse=True)
        for factor in factors:
            self._tie(factor, factor[first][inverse])
        free = atoms > 0
        self._define(atoms[free], [factor[first][free] for factor in factors])

    def _define(self, atoms: Atoms, factors: list[Atoms]) -> None:
        left, rest = factors[0], factors[1:]
        if len(rest) > 1:
            right = self.fresh(len(atoms))
            self._define(right, rest)
        else:
            right = rest[0]
        self.has_definitions = True
        self._left[atoms], self._right[atoms] = left, right
        self._defined[atoms] = True

    def _tie(self, a: Atoms, b: Atoms) -> None:
        """Union of leaf atoms, pairwise; the smaller root wins, so that 0 always does."""
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not np.count_nonzero(differ):
                return
            a, b = a[differ], b[differ]
            self._parent[np.maximum(a, b)] = np.minimum(a, b)  # of several the last; then again


def _without(columns: list[Atoms], others: list[Atoms]) -> list[Atoms]:
    return [c for c in columns if not any(np.array_equal(c, d) for d in others)]


def _partition(column: Atoms) -> Atoms:
    """Which positions are alike, numbered by first appearance; zeros are never alike others."""
    _, first, inverse = np.unique(column, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return np.where(column == 0, -1, rank[inverse])


def _compact(columns: list[Atoms]) -> list[Atoms]:
    """Fold columns that never overlap into one, so that expansions of parts stay narrow."""
    merged: list[Atoms] = []
    for column in columns:
        for index, other in enumerate(merged):
            if not (column.astype(bool) & other.astype(bool)).any():
                merged[index] = column + other
                break
        else:
            merged.append(column)
    return merged
