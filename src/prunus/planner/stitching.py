"""Plans judged by what becomes of the model: cut on a copy, repaired in closed form, compared.

Scores are of units, one by one; what a plan costs shows when everything is gone at once and what
stays was fitted to it.  :func:`search_coefficients` looks for what the scores of each group have to
be multiplied by for the planner's sums to agree with that: the search of SPDY (Frantar & Alistarh,
2022), whose stitched model is the compensated one here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from torch import nn

from prunus.calibration.batches import first_batches
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.importance import Statistics
from prunus.recovery import LOOKED_AT, answers_of, compensate, distance, recalibrate
from prunus.recovery.norms import batch_norms
from prunus.tracer.copies import duplicate
from prunus.tracer.forward_fn import entered_by
from prunus.tracer.precision import alone

Choice = TypeVar("Choice")

_FIRST = 0.5
"""Part of the trials that draw all coefficients; the others change a few of the best."""

_CHANGED = 0.1
"""Part of the coefficients that such a trial draws again."""

_SPREAD = 0.7
"""Deviation of the logarithm of a coefficient."""


class Stitcher:
    """Makes smaller copies of a model, repaired without labels, and says how far off they are.

    Parameters
    ----------
    graph, model
        The model is not modified.
    batches
        On which batch norms are measured again; outputs are compared on the first few.
    statistics
        Second moments of the graph, for least squares.
    """

    def __init__(
        self,
        graph: CouplingGraph,
        model: nn.Module,
        batches: Sequence[Any],
        statistics: Statistics,
    ) -> None:
        self._graph, self._model = graph, model
        self._batches, self._statistics = batches, statistics
        self._looked_at = first_batches(batches, LOOKED_AT)  # answers of all might fill the memory
        with entered_by(model, graph.forward_fn):
            self._dense = answers_of(model, self._looked_at)

    def build(self, plan: Plan) -> tuple[nn.Module, float]:
        """The smaller model, and √(Σ (y − y₀)² / Σ y₀²) over its outputs.

        Batch norms are measured again where that brings the outputs nearer.
        """
        with alone(), entered_by(self._model, self._graph.forward_fn), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few samples: it is said once, at the end
            smaller = duplicate(self._model)
            compensate(smaller, plan, self._graph, statistics=self._statistics, check=False)
            error = self._error_of(smaller)
            if not batch_norms(smaller):
                return smaller, error
            settled = recalibrate(duplicate(smaller), self._batches)
            found = self._error_of(settled)
        return (settled, found) if found < error else (smaller, error)

    def _error_of(self, smaller: nn.Module) -> float:
        return distance(self._dense, answers_of(smaller, self._looked_at))


@dataclass(frozen=True)
class Searched(Generic[Choice]):
    """The best choice of a search, its error, and that of the first one."""

    best: Choice
    error: float
    first: float


def search_coefficients(
    names: Sequence[str],
    choose: Callable[[Mapping[str, float]], Choice],
    error_of: Callable[[Choice], float],
    *,
    trials: int,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Searched[Choice]:
    """The choice of least error among those that some coefficients lead to.

    The first trial has ones, so that the result is never worse than without a search; then some
    draw all coefficients, and the others draw a tenth of the best ones again.

    Parameters
    ----------
    names
        Of what has a coefficient.
    choose
        From coefficients to a choice; coefficients that lead to none may raise what they like.
    error_of
        Of a choice; less is better, NaN is worst.

    >>> def nearest(coefficients):
    ...     return min(coefficients, key=coefficients.get)
    >>> found = search_coefficients(["a", "b"], nearest, {"a": 3.0, "b": 1.0}.get, trials=9)
    >>> found.best, found.error, found.first
    ('b', 1.0, 3.0)
    """
    generator = np.random.default_rng(seed)
    coefficients = np.zeros(len(names))  # logarithms
    best: Choice | None = None
    least = first = float("inf")
    kept = coefficients
    for trial in range(trials):
        if trial:
            drawn = generator.normal(0.0, _SPREAD, len(names))
            anew = np.ones(len(names), dtype=np.bool_)
            if trial > _FIRST * trials:
                anew = generator.random(len(names)) < _CHANGED
                anew[generator.integers(len(names))] = True
            coefficients = np.where(anew, drawn, kept)
        found = choose(dict(zip(names, np.exp(coefficients).tolist(), strict=True)))
        error = error_of(found)
        if progress is not None:
            progress(f"trial {trial}: the outputs are off by {error:.2%}")
        if best is None or error < least:
            best, kept = found, coefficients
            least = error if error == error else float("inf")
        first = error if not trial else first
    assert best is not None, "a search has one trial at least"
    return Searched(best, least, first)
