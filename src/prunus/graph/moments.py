"""Moments of a forward, and how many bytes are alive at each, as polynomials in widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prunus.graph.axis import Label, Mask
from prunus.graph.polynomial import Polynomial, measure_widths

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
