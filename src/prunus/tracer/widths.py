"""Widths: the labelled dims that cost polynomials speak of, each once."""

from __future__ import annotations

from collections.abc import Iterable

from prunus.graph.axis import Label
from prunus.graph.polynomial import Monomial, Polynomial
from prunus.graph.program import Span
from prunus.tracer.resolver import Resolve


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
