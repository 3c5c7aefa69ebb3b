"""What a metric says of a plan: of the masked model, or of a smaller copy that was repaired."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunus.calibration.batches import bounded, digest_of
from prunus.errors import DataError
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.importance import collect
from prunus.planner.stitching import Stitcher
from prunus.recovery.attention_rows import projections_of
from prunus.surgeon.mask import mask

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Judge:
    """Says by a metric how good plans for a model are; the model is not modified.

    Attributes
    ----------
    stitcher
        What makes smaller, repaired copies; None where the model is masked.
    repaired_on
        A hash of the batches that they are repaired on; empty where the model is masked.
    """

    graph: CouplingGraph
    model: nn.Module
    metric: Metric
    stitcher: Stitcher | None = None
    repaired_on: str = ""
    _traces: dict[Any, CouplingGraph] = field(default_factory=dict, repr=False)

    def dense(self, whole: Plan) -> float:
        """The metric of the whole model, run as it was traced."""
        with mask(whole, self.model, forward_fn=self.graph.forward_fn):
            return read_metric(self.metric, self.model, "the whole model")

    def value(self, plan: Plan, where: str) -> float:
        """The metric under a plan; ``where`` says in an error of which plan."""
        if self.stitcher is not None:
            smaller, _ = self.stitcher.build(plan)
            return read_metric(self.metric, smaller, where)
        with mask(plan, self.model, forward_fn=self.graph.forward_fn, traces=self._traces):
            return read_metric(self.metric, self.model, where)


def judge_by(
    graph: CouplingGraph, model: nn.Module, metric: Metric, batches: Sequence[Any] | None
) -> Judge:
    """A judge of masked models, or with batches of copies that are repaired on these."""
    if batches is None:
        return Judge(graph, model, metric)
    statistics = collect(model, graph, batches, "second_moment", also=projections_of(graph))
    stitcher = Stitcher(graph, model, batches, statistics)
    return Judge(graph, model, metric, stitcher, digest_of(batches))


def batches_to_repair(data: Iterable[Any] | None) -> list[Any]:
    """Calibration batches as a list, since every repair reads them.

    Raises
    ------
    DataError
        If there are none.
    """
    if data is None:
        raise DataError(
            "repaired=True needs calibration data",
            why="what stays is fitted to what went, on what the layers read",
            fix="give data=loader; labels are not needed",
        )
    return list(bounded(data))


def read_metric(metric: Metric, model: nn.Module, where: str) -> float:
    """What a metric says of a model, run in eval mode, which is put back.

    Raises
    ------
    DataError
        If that is no finite number.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            found = metric(model)
    finally:
        for module, mode in modes.items():
            module.training = mode
    try:
        value = float(found)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the metric returned a {type(found).__name__}",
            where=where,
            why="it has to be a number, of which more is better",
            fix="return float(…)",
        ) from error
    if not math.isfinite(value):
        raise DataError(
            f"the metric returned {value}",
            where=where,
            why="numbers that are not finite can't be compared",
            fix="bound it: return -min(loss, 1e6), say",
        )
    return value
