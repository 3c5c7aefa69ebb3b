"""The latency table: what was measured of every operator, and what a model takes by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prunus.errors import PlanError, checks_options
from prunus.graph.axis import Label, Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.polynomial import Monomial, Polynomial, measure_widths
from prunus.latency.backends import Backend
from prunus.latency.operators import Invocation, find_invocations
from prunus.latency.samples import STEPS, Samples, fit_step

PICOSECONDS = 1000
"""In a nanosecond: the unit of the polynomial's integers."""


@checks_options
@dataclass(frozen=True)
class LatencyTable:
    """Nanoseconds of the operators of a model at some widths, on one machine.

    Attributes
    ----------
    backend
        What ran them, and what runs the model to check a plan.
    dtype
        Of the model's numbers.
    samples
        What was measured, by the key of the operator.
    dense_ns
        Of the whole dense model.
    unmeasured
        Operators that the backend could not run alone, with the reason; their time counts as fixed.
    """

    backend: Backend
    dtype: str
    samples: Mapping[str, Samples] = field(repr=False)
    dense_ns: float
    unmeasured: Mapping[str, str] = field(default_factory=dict, repr=False)

    def predict(self, graph: CouplingGraph) -> Prediction:
        """Times of any pruning of a graph.

        Raises
        ------
        PlanError
            If an operator of the graph was not measured: the table is that of another model.
        """
        invocations, labels = find_invocations(graph, self.dtype, self.backend.absorbs)
        known, missing = [], []
        for invocation in invocations:
            key = invocation.operator.key
            if key in self.samples:
                known.append(invocation)
            elif key not in self.unmeasured:
                missing.append(invocation)
        if missing:
            raise PlanError(
                f"the latency table does not know {len(missing)} of {len(invocations)} operators",
                where=f"{missing[0].operator.name} in {missing[0].module or 'the model'}",
                why="it is that of another model, of other inputs, or of other outputs",
                fix="make one: prunus.latency.measure(model, args, graph=graph)",
            )
        return Prediction(self, tuple(known), labels)


class OperatorTime(NamedTuple):
    """One operator of the dense model, all its invocations together.

    Attributes
    ----------
    widths, steps
        Those that can change, and for a contraction the multiples at which its time steps.
    """

    name: str
    modules: tuple[str, ...]
    widths: tuple[int, ...]
    steps: tuple[int, ...]
    nanoseconds: float


@dataclass(frozen=True)
class Prediction:
    """What a table says of one graph.

    The operators' sum is less than what the whole model takes; the rest is fixed.  Where it is
    more (operators run faster beside one another), all are scaled down.

    Attributes
    ----------
    labels
        The labelled dims whose widths matter: those of the graph, then further ones.
    """

    table: LatencyTable
    invocations: tuple[Invocation, ...]
    labels: tuple[Label, ...] = field(repr=False)

    def widths(self, kept: Mask) -> NDArray[np.int64]:
        """Kept positions of every labelled dim."""
        return measure_widths(self.labels, kept)

    @cached_property
    def full(self) -> NDArray[np.int64]:
        """The widths of the dense model."""
        return np.array([len(label) for label in self.labels], dtype=np.int64)

    @cached_property
    def fixed_ns(self) -> float:
        """What no width changes."""
        return max(0.0, self.table.dense_ns - self._sum(self.full))

    @cached_property
    def _scale(self) -> float:
        total = self._sum(self.full)
        return min(1.0, self.table.dense_ns / total) if total else 1.0

    def time(self, widths: NDArray[np.float64] | NDArray[np.int64]) -> float:
        """Nanoseconds of the whole model at these widths."""
        return self.fixed_ns + self._scale * self._sum(widths)

    def polynomial(self, widths: NDArray[np.float64] | NDArray[np.int64]) -> Polynomial:
        """Picoseconds of the whole model: exact at these widths, and right near them."""
        terms: dict[tuple[int, ...], float] = {}
        fits: dict[tuple[str, tuple[float, ...]], dict[tuple[int, ...], float]] = {}
        for invocation in self.invocations:
            key = invocation.operator.key
            own = tuple(float(widths[dim]) for dim in invocation.dims)
            if (key, own) not in fits:
                fits[key, own] = self.table.samples[key].fit(own)
            for letters, constant in fits[key, own].items():
                dims = tuple(sorted(invocation.dims[n] for n in letters))
                terms[dims] = terms.get(dims, 0.0) + constant
        factor = PICOSECONDS * self._scale
        fixed = PICOSECONDS * self.fixed_ns + factor * terms.pop((), 0.0)
        rounded = {dims: round(factor * constant) for dims, constant in terms.items()}
        found = (Monomial(constant, dims) for dims, constant in rounded.items() if constant)
        return Polynomial(round(fixed), tuple(found))

    @cached_property
    def step(self) -> int:
        """The multiple that widths of contractions should be of: that at which they step in all."""
        savings = np.zeros((2, len(STEPS)))
        for invocation in self.invocations:
            samples = self.table.samples[invocation.operator.key]
            if samples.operator.factors:
                savings += sum(map(samples.savings, range(len(samples.operator.full))))
        return fit_step(savings)

    def shares(self) -> list[OperatorTime]:
        """What the dense model spends in which operator, the most first."""
        found: dict[str, list[Invocation]] = {}
        for invocation in self.invocations:
            found.setdefault(invocation.operator.key, []).append(invocation)
        times = {key: self.table.samples[key].time(found[key][0].operator.full) for key in found}
        return sorted(
            (
                OperatorTime(
                    own[0].operator.name,
                    tuple(invocation.module for invocation in own),
                    own[0].operator.full,
                    self.table.samples[key].steps if own[0].operator.factors else (),
                    times[key] * len(own) * self._scale,
                )
                for key, own in found.items()
            ),
            key=lambda row: (-row.nanoseconds, row.modules),
        )

    def _sum(self, widths: Sequence[float] | NDArray[np.float64] | NDArray[np.int64]) -> float:
        known: dict[tuple[str, tuple[float, ...]], float] = {}
        total = 0.0
        for invocation in self.invocations:
            key = invocation.operator.key, tuple(float(widths[dim]) for dim in invocation.dims)
            if key not in known:
                known[key] = self.table.samples[key[0]].time(key[1])
            total += known[key]
        return total
