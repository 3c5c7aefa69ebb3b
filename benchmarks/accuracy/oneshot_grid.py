"""The grid of the one-shot benchmarks: importances, recoveries, and inputs that never mix.

Nothing is trained, and no label is read before accuracy is counted.  Every cell starts from the
dense model again: a plan is cut, and repaired with what one pass over the calibration inputs saw.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import prunus

IMPORTANCES = ("random", "l2", "taylor", "flap", "obs")
NEEDS = ("gradient", "activation", "second_moment")
"""What they read, and least squares as well."""


@dataclass(frozen=True)
class Calibrated:
    """A dense model, what was traced, calibration batches, and what one pass over them saw."""

    model: nn.Module
    graph: prunus.CouplingGraph
    batches: Sequence[Any]
    statistics: prunus.importance.Statistics

    def plan(self, importance: str, **options: Any) -> prunus.Plan:
        """A plan for the dense model; ``options`` as of :func:`prunus.plan`."""
        return prunus.plan(
            self.graph, self.model, importance=importance, statistics=self.statistics, **options
        )


def _cut(dense: Calibrated, plan: prunus.Plan) -> nn.Module:
    model = copy.deepcopy(dense.model)
    prunus.apply(plan, model)
    return model


def _compensated(dense: Calibrated, plan: prunus.Plan, method: Any) -> nn.Module:
    model = copy.deepcopy(dense.model)
    prunus.recovery.compensate(model, plan, dense.graph, statistics=dense.statistics, method=method)
    return model


RECOVERIES: dict[str, Callable[[Calibrated, prunus.Plan], nn.Module]] = {
    "cut": _cut,
    "recalibrated": lambda d, plan: prunus.recovery.recalibrate(_cut(d, plan), d.batches),
    "bias": lambda d, plan: _compensated(d, plan, "bias"),
    "least squares": lambda d, plan: _compensated(d, plan, "least_squares"),
    "least squares + recalibrated": lambda d, plan: prunus.recovery.recalibrate(
        _compensated(d, plan, "least_squares"), d.batches
    ),
}
"""What makes a smaller copy of the dense model; the model of a :class:`Calibrated` stays whole."""


def fill(
    cells: Sequence[dict[str, Any]], calibrate: Callable[[], Calibrated], **options: Any
) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """The smaller model of every cell; the calibration inputs are looked at once for all.

    Parameters
    ----------
    cells
        Each with its importance, scope, recovery and level, the share of the MACs.
    options
        Of :func:`prunus.plan`.
    """
    dense = calibrate() if cells else None
    plans: dict[Any, prunus.Plan] = {}
    for cell in cells:
        assert dense is not None
        chosen = cell["importance"], cell["level"]
        if chosen not in plans:
            budget = prunus.Budget(macs=cell["level"])
            plans[chosen] = dense.plan(
                cell["importance"], budget=budget, scope=cell["scope"], round_to=1, **options
            )
        yield cell, RECOVERIES[cell["recovery"]](dense, plans[chosen])


def digest(values: Tensor | bytes) -> str:
    """A hash of the values of one input.

    >>> import torch
    >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(b"a") == digest(b"b")
    (True, False)
    """
    content = values if isinstance(values, bytes) else values.contiguous().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def check_disjoint(calibration: Iterable[Tensor | bytes], test: Iterable[Tensor | bytes]) -> None:
    """Refuse to calibrate on what is tested on: no input may be in both.

    >>> check_disjoint([b"a", b"b"], [b"b"])
    Traceback (most recent call last):
        ...
    ValueError: 1 calibration input is a test input as well
    """
    seen = {digest(values) for values in test}
    both = sum(digest(values) in seen for values in calibration)
    if both:
        told = "input is a test input" if both == 1 else "inputs are test inputs"
        raise ValueError(f"{both} calibration {told} as well")
