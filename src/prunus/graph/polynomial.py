"""Costs as polynomials in the widths of labelled dims; for memory, one at each moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Label, Mask


@dataclass(frozen=True, slots=True)
class Monomial:
    """``constant`` × the product of the widths whose indices are in ``widths``."""

    constant: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Polynomial:
    """A sum of monomials; ``fixed`` is the part that no pruning changes.

    >>> area = Polynomial(10, (Monomial(3, (0, 1)),))
    >>> area(np.array([4, 5]))
    70
    """

    fixed: int
    terms: tuple[Monomial, ...]

    def __call__(self, widths: Sequence[int] | NDArray[np.int64]) -> int:
        """Exact value for the given widths (Python integers, so nothing overflows)."""
        total = self.fixed
        for term in self.terms:
            product = term.constant
            for index in term.widths:
                product *= int(widths[index])
            total += product
        return total

    def times(self, factor: int) -> Polynomial:
        """The polynomial, multiplied by a whole number."""
        terms = tuple(Monomial(factor * term.constant, term.widths) for term in self.terms)
        return Polynomial(factor * self.fixed, terms)


def add_up(polynomials: Iterable[Polynomial]) -> Polynomial:
    """The sum, like terms collected.

    >>> one = Polynomial(1, (Monomial(2, (0,)), Monomial(3, (0, 1))))
    >>> both = add_up([one, Polynomial(4, (Monomial(5, (0,)),))])
    >>> both.fixed, [(term.constant, term.widths) for term in both.terms]
    (5, [(7, (0,)), (3, (0, 1))])
    """
    fixed = 0
    terms: dict[tuple[int, ...], int] = {}
    for polynomial in polynomials:
        fixed += polynomial.fixed
        for term in polynomial.terms:
            terms[term.widths] = terms.get(term.widths, 0) + term.constant
    return Polynomial(fixed, tuple(Monomial(c, widths) for widths, c in terms.items()))


def measure_widths(labels: Sequence[Label], kept: Mask) -> NDArray[np.int64]:
    """Number of positions that stay in each labelled dim; shape ``(len(labels),)``."""
    return np.array([int(kept[label].all(axis=1).sum()) for label in labels], dtype=np.int64)


PEAK = "activation"
"""The cost that is the most of all moments, and so no polynomial itself."""


@dataclass(frozen=True)
class TimePoints:
    """What is alive while a forward runs.

    Attributes
    ----------
    labels
        The labelled dims that the polynomials speak of by index; those of the other costs first.
    bytes
        Of every moment that may be the worst, by where it is: ``"layer1.0.conv1 (operator 3)"``.
    """

    labels: tuple[Label, ...]
    bytes: dict[str, Polynomial]

    def values(self, kept: Mask) -> dict[str, int]:
        """Bytes alive at every moment, with the given units kept."""
        widths = measure_widths(self.labels, kept)
        return {name: polynomial(widths) for name, polynomial in self.bytes.items()}


FindMoments = Callable[[tuple[Label, ...]], TimePoints]
"""From the labels of the other costs; called once, and only where memory is asked for."""


def drop_dominated(bytes: dict[str, Polynomial]) -> dict[str, Polynomial]:
    """Leave out moments that are never worse than another one, whatever the widths are.

    >>> from prunus.graph.polynomial import Monomial
    >>> less, more = Polynomial(1, (Monomial(2, (0,)),)), Polynomial(1, (Monomial(3, (0,)),))
    >>> list(drop_dominated({"a": less, "b": more, "c": more}))
    ['b']
    """
    tables = {
        name: {(): polynomial.fixed, **{term.widths: term.constant for term in polynomial.terms}}
        for name, polynomial in bytes.items()
    }
    found: dict[str, dict[tuple[int, ...], int]] = {}
    for name, table in sorted(tables.items(), key=lambda item: -sum(item[1].values())):
        if not any(_covers(other, table) for other in found.values()):
            found[name] = table
    return {name: bytes[name] for name in bytes if name in found}


def _covers(more: dict[tuple[int, ...], int], less: dict[tuple[int, ...], int]) -> bool:
    return all(more.get(widths, 0) >= constant for widths, constant in less.items())
