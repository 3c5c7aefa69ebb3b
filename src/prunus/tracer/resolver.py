"""From atoms to units: roots that live on state, numbered in the model's order."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Axis, Label
from prunus.graph.program import Labels
from prunus.tracer.capture import Recorder
from prunus.tracer.labels import MAX_FACTORS

Resolve = Callable[[Label | None], Label | None]
"""Turns a label of atoms into one of units."""


class Resolver:
    """Numbers the roots that live on state as units 1 … count, in the model's order."""

    def __init__(self, recorder: Recorder, names: list[str]) -> None:
        self._algebra = recorder.algebra
        self._cache: dict[int, tuple[Label, Label | None]] = {}
        rank = {name: index for index, name in enumerate(names)}
        numbers = sorted(recorder.state, key=lambda number: rank[recorder.state[number]])
        self._settle(recorder.labels)
        found: dict[Axis, Label] = {}
        for number in numbers:
            for dim, label in enumerate(recorder.labels[number]):
                flat = self._algebra.canonical(label)
                if flat is not None:
                    found[Axis(recorder.state[number], dim)] = flat
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
