"""What was measured of one operator, and what that says of any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from math import ceil, prod

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from prunus.latency.operators import Operator

Widths = tuple[int, ...]
"""One for each letter of an operator."""

Terms = dict[tuple[int, ...], float]
"""A polynomial: numbers of the letters that are multiplied → constant."""

STEPS = (1, 2, 4, 8, 16, 32)
"""How far under its full width an operator is measured, to find where its time steps."""

_FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)
_FEW_FRACTIONS = (0.25, 0.5, 1.0)
"""Of the full width, where an operator is measured; few of them if it has three widths or more."""

_NEAR = 0.5
"""How far off, in the logarithm of a width, a sample has still much of a say in a slope."""

_PAID = 0.5
"""A step pays if it saves this part at least of what as many channels save on the average."""


def choose_widths(operator: Operator) -> tuple[Widths, ...]:
    """Where to measure: a grid for a contraction, with finer steps below the full widths.

    The time of any other operator hangs on how much it reads and writes, so for these all widths
    grow together.
    """
    full = operator.full
    if operator.factors is None:
        axes = [_axis(width, _FRACTIONS, even=False) for width in full]
        return tuple(zip(*axes, strict=True))
    chosen = set(product(*_grid(operator)))
    for letter, width in enumerate(full):
        for step in STEPS:
            if width - step >= width / 2:
                chosen.add((*full[:letter], width - step, *full[letter + 1 :]))
    return tuple(sorted(chosen))


def _grid(operator: Operator) -> list[tuple[int, ...]]:
    fractions = _FRACTIONS if len(operator.full) < 3 else _FEW_FRACTIONS
    return [tuple(sorted(set(_axis(width, fractions, even=True)))) for width in operator.full]


def _axis(full: int, fractions: Sequence[float], *, even: bool) -> list[int]:
    """Fractions of a width, multiples of 8 where it is wide enough for that to matter."""
    multiple = 8 if even and full >= 32 else 1
    return [min(full, ceil(part * full / multiple) * multiple) for part in fractions]


@dataclass(frozen=True, eq=False)
class Samples:
    """Nanoseconds of one operator at the widths of :func:`choose_widths`."""

    operator: Operator
    times: Mapping[Widths, float]

    @cached_property
    def steps(self) -> Widths:
        """For each letter the multiple at which time steps; 1 where it grows evenly."""
        return tuple(self._find_step(letter) for letter in range(len(self.operator.full)))

    def time(self, widths: Sequence[float]) -> float:
        """Nanoseconds at any widths: between samples, those of a contraction on the next step."""
        if self.operator.factors is None:
            volumes, times = self._by_volume
            return float(np.interp(self.operator.count_elements(widths), volumes, times))
        full = self.operator.full
        stepped = [
            min(ceil(width / step) * step, most)
            for width, step, most in zip(widths, self.steps, full, strict=True)
        ]
        ends = [_between(axis, width) for axis, width in zip(self._axes, stepped, strict=True)]
        return sum(
            self.times[tuple(width for width, _ in corner)] * prod(share for _, share in corner)
            for corner in product(*ends)
        )

    def fit(self, widths: Sequence[float]) -> Terms:
        """A polynomial that follows the samples near these widths, and is exact there.

        No constant is negative, so savings only shrink while units go.
        """
        points = list(product(*self._axes)) if self.operator.factors is not None else [*self.times]
        distance = np.log(np.array(points) / np.maximum(widths, 1.0))
        near = np.exp(-((distance / _NEAR) ** 2).sum(axis=1) / 2) + 1e-3
        times = np.array([self.times[point] for point in points])
        rows = np.array([[_value(terms, point) for terms in self._features] for point in points])
        scale = np.sqrt(near) / times
        columns = rows.max(axis=0)
        shares, _ = nnls(rows / columns * scale[:, None], times * scale)
        found: Terms = {}
        for share, column, terms in zip(shares, columns, self._features, strict=True):
            for letters, constant in terms.items():
                found[letters] = found.get(letters, 0.0) + share / column * constant
        value = _value(found, widths)
        exact = self.time(widths) / value if value > 0 else 1.0
        return {letters: constant * exact for letters, constant in found.items() if constant}

    @cached_property
    def _features(self) -> list[Terms]:
        """Polynomials of which the time is a sum with positive shares."""
        factors = self.operator.factors
        if factors is None:
            fixed, terms = self.operator.volume
            return [{(): 1.0}, {(): float(fixed), **terms}]
        parts = {part for n in range(len(factors) + 1) for part in combinations(factors, n)}
        return [{part: 1.0} for part in sorted(parts)]

    @cached_property
    def _axes(self) -> list[tuple[int, ...]]:
        return _grid(self.operator)

    @cached_property
    def _by_volume(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Elements read and written, ascending, and their times, which never fall."""
        pairs = sorted((self.operator.count_elements(w), time) for w, time in self.times.items())
        volumes, times = np.array(pairs).T
        return volumes, np.maximum.accumulate(times)

    def _find_step(self, letter: int) -> int:
        """The least cut below the full width that saves at least half of its share."""
        full = self.operator.full

        def at(width: int) -> float | None:
            return self.times.get((*full[:letter], width, *full[letter + 1 :]))

        whole, middle = (
            self.times[full],
            min(self._axes[letter], key=lambda w: abs(2 * w - full[letter])),
        )
        least = at(middle)
        if least is None or whole <= least:
            return 1
        share = (whole - least) / (full[letter] - middle)
        for step in STEPS:
            time = at(full[letter] - step)
            if time is not None and whole - time >= _PAID * share * step:
                return step
        return 1


def _between(axis: Sequence[int], width: float) -> list[tuple[int, float]]:
    """The samples around a width, and the share of each."""
    high = next((n for n, known in enumerate(axis) if known >= width), len(axis) - 1)
    if not high or axis[high] <= width:
        return [(axis[high], 1.0)]
    low, top = axis[high - 1], axis[high]
    share = (width - low) / (top - low)
    return [(low, 1 - share), (top, share)]


def _value(terms: Mapping[tuple[int, ...], float], widths: Sequence[float]) -> float:
    return sum(c * prod(widths[n] for n in letters) for letters, c in terms.items())
