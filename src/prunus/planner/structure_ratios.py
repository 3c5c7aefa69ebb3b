"""What is asked by structure as ratios of groups, which the solver meets as any others."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from prunus.errors import PlanError
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.polynomial import Monomial, Polynomial
from prunus.planner.allocate import select
from prunus.planner.filters import spread
from prunus.planner.measured import measured_counts
from prunus.planner.option_values import check_count, check_ratio, check_share
from prunus.planner.options import PlanOptions
from prunus.structures.amounts import Asked

Scores = NDArray[np.float64]

GLOBAL_RATIO = 0.8
"""What a group may lose at most where all compete, unless somebody says otherwise."""


def structure_ratios(
    graph: CouplingGraph,
    model: nn.Module,
    scores: Scores,
    asked: PlanOptions,
    hold: Mapping[str, str],
    wanted: Mapping[str, Mapping[str, Asked]],
) -> dict[str, float]:
    """The ratio of every group that ``asked.remove`` speaks of, by its name.

    ``wanted`` is what :func:`prunus.structures.amounts.units_asked` reads from it.

    One unit of each group is kept.  Beyond the local scope a share is one of all groups of a
    structure together, to the nearest unit.

    Raises
    ------
    PlanError
        If the model lacks a structure, an amount removes nothing or too much, all groups of a
        structure are held, or ``ratios`` speaks of the same group.
    """
    given = spread(graph, asked.ratios or {}, "ratios", check_share)
    sizes = {group.name: group.size for group in graph.groups}
    found: dict[str, float] = {}
    for structure, groups in wanted.items():
        open_groups = _not_held(structure, groups, hold)
        counts = {name: min(one.units, sizes[name] - 1) for name, one in open_groups.items()}
        if asked.scope != "local" and not any(one.counted for one in groups.values()):
            counts = _pooled(graph, model, scores, asked, hold, open_groups)
        _refuse_nothing(structure, groups, counts, sizes)
        _refuse_twice(structure, counts, {**given, **found})
        found |= counts
    return {name: count / sizes[name] for name, count in found.items()}


def _not_held(
    structure: str, wanted: Mapping[str, Asked], hold: Mapping[str, str]
) -> dict[str, Asked]:
    found = {name: one for name, one in wanted.items() if name not in hold}
    if not found:
        raise PlanError(
            f"{structure} can't be removed",
            where="remove=",
            why="; ".join(dict.fromkeys(hold[name] for name in wanted)),
        )
    return found


def _refuse_twice(structure: str, counts: Collection[str], others: Collection[str]) -> None:
    twice = [name for name in counts if name in others]
    if twice:
        raise PlanError(
            f"the group {twice[0]} is named twice",
            where="remove=",
            why=f"by {structure} and by ratios",
            fix="leave out one of them",
        )


def _refuse_nothing(
    structure: str,
    wanted: Mapping[str, Asked],
    counts: Mapping[str, float],
    sizes: Mapping[str, int],
) -> None:
    if max(counts.values()) >= 0.5 or not any(one.units for one in wanted.values()):
        return
    largest = max(sizes[name] for name in counts)
    raise PlanError(
        f"the share of {structure} is less than half a unit of every group",
        where="remove=",
        why=f"the largest group has {largest} units",
        fix=f"give at least {1 / (2 * largest):.3g}, or a count: 1",
    )


def _pooled(
    graph: CouplingGraph,
    model: nn.Module,
    scores: Scores,
    asked: PlanOptions,
    hold: Mapping[str, str],
    wanted: Mapping[str, Asked],
) -> dict[str, float]:
    """Units that groups lose which compete for what they lose together.

    The number of their units is a cost, and what they keep together is its bound; or the layers
    are tried (:mod:`prunus.planner.measured`).
    """
    groups = [graph.group(name) for name in wanted]
    size = sum(group.size for group in groups)
    total = math.floor(sum(one.units for one in wanted.values()) + 0.5)
    most = max(GLOBAL_RATIO, total / size) if asked.max_ratio is None else asked.max_ratio
    if asked.scope == "measured":
        may_lose = _may_lose(graph, asked, wanted, most)
        return {**measured_counts(graph, model, scores, asked, may_lose, total)}
    widths = len(graph.width_labels)
    cost = Polynomial(0, tuple(Monomial(1, (widths + n,)) for n in range(len(groups))))
    counting = replace(
        graph,
        costs={"units": cost},
        width_labels=(*graph.width_labels, *(group.units[:, None] for group in groups)),
    )
    chosen = select(
        *(counting, scores, {"units": size - total}),
        scope=asked.scope,
        normalise=asked.normalise or "mean",
        min_width=asked.min_width,
        max_ratio=most,
        include=list(wanted),
        held=hold,
    )
    return {group.name: int((~chosen.kept[group.units]).sum()) for group in groups}


def _may_lose(
    graph: CouplingGraph,
    asked: PlanOptions,
    wanted: Collection[str],
    max_ratio: float | Mapping[str, float],
) -> dict[str, int]:
    """How many units each group may lose."""
    least = spread(graph, asked.min_width, "min_width", check_count)
    ratios = spread(graph, max_ratio, "max_ratio", check_ratio)
    sizes = {name: graph.group(name).size for name in wanted}
    return {
        name: min(size - least.get(name, 1), math.floor(ratios.get(name, 1.0) * size + 1e-9))
        for name, size in sizes.items()
    }


def check_counts(
    graph: CouplingGraph, wanted: Mapping[str, Mapping[str, Asked]], kept: Mask
) -> None:
    """Refuse a choice that removes another number of units than was counted.

    Raises
    ------
    PlanError
        It names the group, and what the choice comes to.
    """
    for structure, groups in wanted.items():
        for name, one in groups.items():
            gone = int((~kept[graph.group(name).units]).sum())
            if one.counted and gone not in (0, one.units):
                raise PlanError(
                    f"exactly {one.units:g} units can't be removed",
                    where=f"group {name}",
                    why="it loses units in steps only (`prunus inspect` says why); the nearest "
                    f"number is {gone}",
                    fix=f"remove={{{structure!r}: {gone}}}, or a share",
                )
