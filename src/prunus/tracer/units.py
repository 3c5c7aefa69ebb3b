"""From atoms to units, and polynomials over their widths: sizes, and bytes alive at a moment."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunus.graph.axis import Axis, Label
from prunus.graph.polynomial import Monomial, Polynomial, TimePoints, drop_dominated
from prunus.graph.program import Labels, Lifetime, Program, Span
from prunus.tracer.labels import MAX_FACTORS, Algebra

Resolve = Callable[[Label | None], Label | None]
"""Turns a label of atoms into one of units."""


class Resolver:
    """Numbers the roots that live on state as units 1 … count, in the model's order.

    Parameters
    ----------
    labels
        Of every value, by its number.
    state
        The values that are tensors of state, with their names.
    names
        Those names in the model's order.
    """

    def __init__(
        self,
        algebra: Algebra,
        labels: Sequence[Labels],
        state: Mapping[int, str],
        names: Sequence[str],
    ) -> None:
        self._algebra = algebra
        self._cache: dict[int, tuple[Label, Label | None]] = {}
        rank = {name: index for index, name in enumerate(names)}
        self._settle(labels)
        found: dict[Axis, Label] = {}
        for number in sorted(state, key=lambda number: rank[state[number]]):
            for dim, label in enumerate(labels[number]):
                flat = self._algebra.canonical(label)
                if flat is not None:
                    found[Axis(state[number], dim)] = flat
        self._unit_of = np.zeros(self._algebra.count, dtype=np.int64)
        roots: NDArray[np.int64] = np.concatenate(
            [label.ravel() for label in found.values()] or [np.zeros(0, dtype=np.int64)]
        )
        unique, first = np.unique(roots[roots > 0], return_index=True)
        self._unit_of[unique[np.argsort(first)]] = np.arange(1, len(unique) + 1)
        self.count = len(unique)
        self.roots = np.concatenate([[0], unique[np.argsort(first)]])
        self.axes = {axis: self._unit_of[label] for axis, label in found.items()}

    def _settle(self, labels: Iterable[Labels]) -> None:
        """Let every label that has too many factors pin itself before any is read."""
        found = {id(own): own for dims in labels for own in dims if own is not None}
        if not self._algebra.has_definitions:
            found = {key: label for key, label in found.items() if label.shape[1] > MAX_FACTORS}
        known = -1
        while known != len(self._algebra.events):
            known = len(self._algebra.events)
            for label in found.values():
                self._algebra.canonical(label)

    def __call__(self, label: Label | None) -> Label | None:
        if label is None:
            return None
        cached = self._cache.get(id(label))
        if cached is not None and cached[0] is label:
            return cached[1]
        flat = self._algebra.canonical(label)
        units = None if flat is None else self._unit_of[flat]
        if units is not None and not units.any():
            units = None
        self._cache[id(label)] = (label, units)
        return units


class Widths:
    """Distinct labelled dims by content, and polynomials over them.

    Parameters
    ----------
    resolve
        Turns a label of atoms into one of units.
    known
        Labels of units that have their indices already: 0, 1, ….
    """

    def __init__(self, resolve: Resolve, known: Iterable[Label] = ()) -> None:
        self.labels: list[Label] = []
        self._resolve = resolve
        self._index: dict[bytes, int] = {}
        self._by_id: dict[int, tuple[Label, int | None]] = {}
        for label in known:
            self.index(label)

    def index(self, units: Label) -> int:
        """Index of a label of units."""
        key = units.shape[1].to_bytes(2, "little") + units.tobytes()
        if key not in self._index:
            self._index[key] = len(self.labels)
            self.labels.append(units)
        return self._index[key]

    def polynomial(self, spans: list[Span]) -> Polynomial:
        """The sum of the spans, like terms collected."""
        fixed = 0
        terms: dict[tuple[int, ...], int] = {}
        for span in spans:
            constant, widths = 1, []
            for size, label in span:
                index = self._width(label)
                if index is None:
                    constant *= size
                else:
                    widths.append(index)
            if widths:
                key = tuple(sorted(widths))
                terms[key] = terms.get(key, 0) + constant
            else:
                fixed += constant
        return Polynomial(fixed, tuple(Monomial(c, widths) for widths, c in terms.items()))

    def _width(self, label: Label | None) -> int | None:
        if label is None:
            return None
        cached = self._by_id.get(id(label))
        if cached is not None and cached[0] is label:
            return cached[1]
        units = self._resolve(label)
        found = None if units is None else self.index(units)
        self._by_id[id(label)] = (label, found)
        return found


class Lifetimes:
    """Takes down births and deaths as they happen: Python alone knows how long a tensor lives.

    A module's input, say, lives as long as the module runs, since its caller holds it.

    Parameters
    ----------
    clock
        How many operators have run.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self.found: list[Lifetime] = []
        self._clock = clock
        self._alive: dict[int, tuple[Lifetime, weakref.ref[Any]]] = {}

    def begin(self, tensor: Tensor, value: int) -> None:
        """A tensor has come; nothing happens where its memory is known already."""
        if tensor.layout != torch.strided:
            return  # sparse: its memory is that of several tensors
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        one = Lifetime(value, tensor.element_size(), self._clock())
        self.found.append(one)
        self._alive[key] = one, weakref.ref(storage, lambda _: self._end(key))

    def _end(self, key: int) -> None:
        self._alive.pop(key)[0].died = self._clock()


def find_moments(program: Program, known: tuple[Label, ...]) -> TimePoints:
    """The moments of a program that may be the worst.

    Parameters
    ----------
    known
        The labels of the other costs, which keep their indices.

    Notes
    -----
    The most is alive when an operator has made its outputs and nothing has died yet, so only
    moments before a death are looked at.
    """
    widths = Widths(program.resolve, known)
    count = len(program.nodes)
    born: dict[int, list[Polynomial]] = defaultdict(list)
    died: dict[int, list[Polynomial]] = defaultdict(list)
    for one in program.lifetimes:
        span = tuple(zip(program.shapes[one.value], program.labels[one.value], strict=True))
        size = widths.polynomial([span]).times(one.element_size)
        born[one.born].append(size)
        died[count if one.died is None else one.died].append(size)
    alive: dict[tuple[int, ...], int] = defaultdict(int)
    found: dict[str, Polynomial] = {}
    for moment, node in enumerate(program.nodes):
        _add(alive, born[moment], 1)
        if died[moment + 1] or moment + 1 == count:
            name = f"{node.module or 'the forward'} (operator {moment})"
            terms = (Monomial(c, key) for key, c in alive.items() if c and key)
            found[name] = Polynomial(alive[()], tuple(terms))
        _add(alive, died[moment + 1], -1)
    return TimePoints(tuple(widths.labels), drop_dominated(found))


def _add(alive: dict[tuple[int, ...], int], sizes: list[Polynomial], sign: int) -> None:
    for size in sizes:
        alive[()] += sign * size.fixed
        for term in size.terms:
            alive[term.widths] += sign * term.constant
