"""Groups that can lose units by themselves, and by how much: rows of a sensitivity table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from prunus.errors import PlanError
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group
from prunus.graph.program import state_of
from prunus.importance import Context, Importance, collect, name_of, needs_of, score
from prunus.importance.torch_pruning import adapt
from prunus.planner.culprits import tell_groups, tell_pins
from prunus.planner.filters import excluded_groups
from prunus.planner.option_values import Globs
from prunus.planner.options import ScoreOptions
from prunus.planner.planning import plan


def score_once(
    graph: CouplingGraph, model: nn.Module, asked: ScoreOptions
) -> tuple[Importance, NDArray[np.float64]]:
    """An importance that says of every plan what this one says now, and its scores."""
    importance = adapt(asked.importance, model)
    statistics, needs = asked.statistics, needs_of(importance)
    if statistics is None and asked.data is not None and needs:
        statistics = collect(model, graph, asked.data, needs, loss=asked.loss, seed=asked.seed)
    scores = score(graph, state_of(model)[0], importance, seed=asked.seed, statistics=statistics)

    def settled(group: Group, _: Context) -> NDArray[np.float64]:
        """Scores that were computed before."""
        return scores[group.units]

    settled.__name__ = name_of(importance)
    return settled, scores


def find_loose(
    graph: CouplingGraph,
    model: nn.Module,
    settled: Importance,
    ratios: Sequence[float],
    include: Globs | None,
    exclude: Globs,
) -> dict[str, float]:
    """Groups that can lose units, each with the largest of the ratios that it can lose.

    Of groups that lose units together only the first is there: what one loses says what all do.

    Raises
    ------
    PlanError
        If there is none.
    """
    left_out = excluded_groups(graph, include, exclude)
    together: set[str] = set()
    found: dict[str, float] = {}
    for group in graph.groups:
        if group.name in left_out or group.name in together:
            continue
        for ratio in sorted(ratios, reverse=True):
            touched = _touched(graph, model, settled, group.name, ratio)
            if group.name in touched:
                found[group.name] = ratio
                together |= touched
                break
    if not found:
        raise PlanError(
            "no group can lose units",
            why="\n".join(
                [
                    f"of {len(graph.groups)} groups {len(left_out)} are left out, the others are "
                    f"whole at a ratio of {max(ratios):g}",
                    *tell_groups(left_out),
                    *tell_pins(graph),
                ]
            ),
            fix="let more groups be pruned, or give larger ratios",
        )
    return found


def _touched(
    graph: CouplingGraph, model: nn.Module, settled: Importance, name: str, ratio: float
) -> set[str]:
    """Groups that lose units when one does; none where it can't lose as many."""
    try:
        chosen = plan(graph, model, importance=settled, ratios={name: ratio})
    except PlanError:  # the scores are there already: what is left to refuse is this ratio
        return set()
    return {choice.name for choice in chosen.groups if choice.removed}
