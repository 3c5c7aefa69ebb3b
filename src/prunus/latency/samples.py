"""What was measured of one operator, and what that says of any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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

_CLEAR = 0.05
"""What a cut should save of the whole, at least, to be told from an error of the clock."""


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
    """Fractions of a width; ``even`` ones are multiples of 8 or 4, of which the least comes first.

    Between multiples time may jump, and below the least that was measured nothing is known.
    """
    multiple = next((m for m in (8, 4) if even and full >= 2 * m), 1)
    least = [min(multiple, full)] if even else []
    return least + [min(full, ceil(part * full / multiple) * multiple) for part in fractions]


@dataclass(frozen=True, eq=False)
class Samples:
    """Nanoseconds of one operator at the widths of :func:`choose_widths`.

    ``kin`` is what cuts save on operators of its kind, as :meth:`savings` tells it, as a part of
    the whole time.
    """

    operator: Operator
    times: Mapping[Widths, float]
    kin: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, len(STEPS))), repr=False)

    @cached_property
    def steps(self) -> Widths:
        """For each letter the multiple at which time steps; 1 where it grows evenly."""
        letters = range(len(self.operator.full))
        return tuple(fit_step(self._evidence(letter)) for letter in letters)

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

    def savings(self, letter: int) -> NDArray[np.float64]:
        """What cuts by each of :data:`STEPS` below a letter's full width save, and should save.

        Shape ``(2, len(STEPS))``, in nanoseconds: what should be saved is the same part of what
        goes on the way to half of the width; both are zero where nothing was measured.
        """
        whole, width = self.times[self.operator.full], self.operator.full[letter]
        middle = min(self._axes[letter], key=lambda w: abs(2 * w - width))
        found = np.zeros((2, len(STEPS)))
        least = self._cut(letter, width - middle)
        if least is None or least >= whole:
            return found
        for n, step in enumerate(STEPS):
            time = self._cut(letter, step)
            if time is not None:
                found[:, n] = whole - time, (whole - least) / (width - middle) * step
        return found

    def _evidence(self, letter: int) -> NDArray[np.float64]:
        """Savings of its kind, and beside them its own where they are more than errors."""
        own = self.savings(letter) / self.times[self.operator.full]
        told = (own[1] >= _CLEAR) | (self.kin[1] <= 0)
        evidence: NDArray[np.float64] = self.kin + own * told
        return evidence

    def _cut(self, letter: int, units: int) -> float | None:
        """What was measured with fewer of one letter, if anything was."""
        full = self.operator.full
        return self.times.get((*full[:letter], full[letter] - units, *full[letter + 1 :]))


def fit_step(savings: NDArray[np.float64]) -> int:
    """The one of :data:`STEPS` whose staircase comes nearest to what cuts save; 1 if that is none.

    Cuts save in proportion to the whole steps in them, by least squares; how much is left open,
    since near the full width time may fall less than on the way to half of it.  A cut after which
    it takes longer saves nothing: kernels have slow cases between their steps.
    """
    known = savings[1] > 0
    cuts, (saved, due) = np.array(STEPS)[known], savings[:, known]
    saved = np.maximum(saved, 0.0)
    if not saved.any():
        return 1

    def error(step: int) -> float:
        shape = due * (cuts // step * step) / cuts
        rate = shape @ saved / (shape @ shape) if shape.any() else 0.0
        return float(((saved - rate * shape) ** 2).sum())

    return min(STEPS, key=error)


def relate(samples: Mapping[str, Samples]) -> dict[str, Samples]:
    """The same samples, each told what cuts save on the average operator of its kind.

    Kernels of one kind step alike, but a cut of few channels saves less than a clock errs.
    """
    kinds: dict[str, list[NDArray[np.float64]]] = {}
    for one in samples.values():
        if one.operator.factors is not None:
            whole, letters = one.times[one.operator.full], range(len(one.operator.full))
            rows = kinds.setdefault(one.operator.name, [])
            rows.extend(one.savings(letter) / whole for letter in letters)
    kin = {name: np.mean(rows, axis=0) for name, rows in kinds.items()}
    return {
        key: replace(one, kin=kin.get(one.operator.name, one.kin)) for key, one in samples.items()
    }


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
