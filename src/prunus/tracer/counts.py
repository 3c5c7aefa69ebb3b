"""Dims that hold copies or one number all over, as many as a size says: what sums them counts them.

The sum over ``h.repeat(h.shape[1], 1)`` or over ``torch.ones(h.shape[1])`` is that number times
something.  A model in which units are silenced has as many copies as before, and one that has lost
them would have fewer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from prunus.graph.axis import Label
from prunus.graph.groups import Pin
from prunus.graph.program import Effect, Place
from prunus.tracer.registry import Call

SUMMED = "as many copies as a size says are summed, averaged or normalised here"


def summed_copies(call: Call, effect: Effect) -> Iterator[tuple[Label, Pin]]:
    """Dims of copies over which an operator sums or looks, and that meet nothing else there."""
    algebra = call.algebra
    for place in effect.mixing:
        copies = algebra.copied(_label(call, place))
        if copies is not None:
            yield copies, call.why(SUMMED)
    labels = [label for place in effect.contracted if (label := _label(call, place)) is not None]
    met = [algebra.find(label).ravel() for label in labels if algebra.copied(label) is None]
    others = np.concatenate(met) if met else np.zeros(0, dtype=np.int64)
    for copies in map(algebra.copied, labels):
        if copies is not None and not np.isin(algebra.find(copies), others).any():
            yield copies, call.why(SUMMED)


def _label(call: Call, place: Place) -> Label | None:
    (name, *rest), dim = place
    return call.labels(str(name), *rest)[dim]  # type: ignore[arg-type]
