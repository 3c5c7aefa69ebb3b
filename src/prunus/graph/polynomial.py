"""Costs as polynomials in the widths of labelled dims."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
