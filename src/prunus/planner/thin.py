"""Thin every group by the same ratio, whatever that costs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prunus.errors import PlanError
from prunus.graph.axis import Label, Mask
from prunus.graph.constraints import Aligned, Lockstep, Nonempty
from prunus.graph.coupling import CouplingGraph


def thin(graph: CouplingGraph, scores: NDArray[np.float64], ratio: float) -> Mask:
    """The mask that takes the units of lowest score from every group.

    A group loses the rounded share, at least one unit where it has two, never its last; sets in
    lockstep lose the same number.  Units are given back where a dim would be left empty,
    or no multiple of what a kernel takes.

    Parameters
    ----------
    scores
        Per unit, shape ``(unit_count + 1,)``; infinite for a unit that has to stay.
    ratio
        Share of every group's units, in (0, 1).

    Raises
    ------
    PlanError
        If the ratio is out of range.
    """
    if not 0 < ratio < 1:
        raise PlanError(
            f"a ratio of {ratio} removes nothing or everything",
            fix="give a number between 0 and 1: the share of units that every group loses",
        )
    kept = graph.all_kept
    locked = [c.sets for c in graph.constraints if isinstance(c, Lockstep)]
    in_lockstep = {int(unit) for sets in locked for units in sets for unit in units}
    plain = [g.units for g in graph.groups if not in_lockstep.intersection(g.units.tolist())]
    for units in (*plain, *(units for sets in locked for units in sets)):
        count = min(max(1, round(ratio * len(units))), len(units) - 1)
        order = np.argsort(scores[units], kind="stable")[:count]
        kept[units[order[np.isfinite(scores[units[order]])]]] = False
    dims = [c.label for c in graph.constraints if isinstance(c, Nonempty)]
    for label in (*graph.labels.values(), *dims):
        _fill(label, kept, scores)
    aligned = [c for c in graph.constraints if isinstance(c, Aligned)]
    while any(_round_up(c.label, c.multiple, kept, scores) for c in aligned):
        pass  # what one dim is given back may be one too many for another
    return kept


def _round_up(label: Label, multiple: int, kept: Mask, scores: NDArray[np.float64]) -> bool:
    """Give back the best units of a dim until it is a multiple; whether any was given back."""
    changed = False
    while kept[label].all(axis=1).sum() % multiple:
        gone = np.unique(label[~kept[label]])
        if not len(gone):  # whole, it is no multiple either
            break
        kept[gone[np.argmax(scores[gone])]] = changed = True
    return changed


def _fill(label: Label, kept: Mask, scores: NDArray[np.float64]) -> None:
    """Give back the best position of a dim that would be left empty."""
    if not kept[label].all(axis=1).any():
        gone = np.where(kept[label], 0.0, scores[label]).sum(axis=1)
        best = int(np.argmax(gone))
        kept[label[best]] = True
