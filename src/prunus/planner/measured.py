"""How many units the layers lose each, by the error of the outputs that is measured on the data."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from prunus.calibration.batches import Batches
from prunus.errors import BudgetError, DataError
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group
from prunus.graph.plans import Plan
from prunus.graph.progress import counted
from prunus.importance import Statistics, collect
from prunus.planner.options import PlanOptions
from prunus.recovery import LOOKED_AT, answers_of, compensate, distance
from prunus.surgeon.attributes import find_edits

_ROUNDS = 12
"""Rounds in which what is asked is removed, or few more; in each, every layer is tried once."""


def measured_counts(
    graph: CouplingGraph,
    model: nn.Module,
    scores: np.ndarray[Any, np.dtype[np.float64]],
    asked: PlanOptions,
    most: Mapping[str, int],
    total: int,
) -> dict[str, int]:
    """Units that groups lose, by name, so that ``total`` are lost together.

    In each round every group is tried without a few more units, those of the lowest scores, on a
    copy that is cut and whose readers are fitted again by least squares; the groups that move the
    outputs on the first batches least lose them.

    Parameters
    ----------
    most
        Units that each of the groups may lose.

    Raises
    ------
    DataError
        If there are no data, or nothing of the outputs can be compared.
    BudgetError
        If the groups may not lose as many.
    """
    if asked.data is None:
        raise DataError(
            "scope='measured' needs calibration data",
            why="it compares outputs of smaller models with the dense model's",
            fix="give data=",
        )
    possible = sum(most.values())
    if possible < total:
        raise BudgetError(
            f"{total} units are to be removed, and only {possible} may be",
            why="; ".join(f"{name} may lose {count}" for name, count in most.items()),
            fix="ask for less, or lower min_width= or raise max_ratio=",
        )
    trial = _Trial.of(graph, model, asked)
    groups = {name: graph.group(name) for name in most}
    orders = {name: _ascending(group, scores) for name, group in groups.items()}
    counts = dict.fromkeys(most, 0)
    step = max(1, -(-total // _ROUNDS))
    rounds = counted(itertools.count(), "removing by measured error")
    while sum(counts.values()) < total:
        next(rounds)
        more = _in_a_round(counts, most, step)
        errors = {
            name: trial.error({n: orders[n][: counts[n] + more[n] * (n == name)] for n in counts})
            for name in more
            if more[name]
        }
        missing = min(step, total - sum(counts.values()))
        for name in sorted(errors, key=errors.__getitem__):
            lost = min(more[name], missing)
            counts[name] += lost
            missing -= lost
    return counts


def _in_a_round(counts: Mapping[str, int], most: Mapping[str, int], step: int) -> dict[str, int]:
    """Units that a group may lose in a round, in which half of the open ones make up the step."""
    left = {name: most[name] - count for name, count in counts.items()}
    free = sum(one > 0 for one in left.values())
    each = 1 if step <= free else -(-2 * step // free)
    return {name: min(each, one) for name, one in left.items()}


def _ascending(group: Group, scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return group.units[np.argsort(scores[group.units], kind="stable")]


@dataclass(frozen=True, eq=False)
class _Trial:
    """A model whose units are removed on copies, and what it answers to a few batches."""

    graph: CouplingGraph
    model: nn.Module
    statistics: Statistics
    batches: Sequence[Any]
    dense: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, graph: CouplingGraph, model: nn.Module, asked: PlanOptions) -> _Trial:
        data = Batches(asked.data or (), asked.samples)
        statistics = asked.statistics
        if statistics is None or "second_moment" not in statistics.needs:
            statistics = collect(model, graph, data, "second_moment", seed=asked.seed)
        batches = data.first(LOOKED_AT)
        return cls(graph, model, statistics, batches, answers_of(model, batches))

    def error(self, removed: Mapping[str, Any]) -> float:
        """How far the outputs are off without these units, as a share of the dense outputs."""
        kept: Mask = self.graph.all_kept
        for units in removed.values():
            kept[units] = False
        edits = find_edits(self.model, self.graph, kept)
        plan = replace(Plan.from_mask(self.graph, kept), edits=edits)
        smaller = copy.deepcopy(self.model)
        compensate(smaller, plan, self.graph, statistics=self.statistics)
        return distance(self.dense, answers_of(smaller, self.batches))
