"""What stops a plan, group by group: why no more of it would go whatever the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.planner.steps import Quanta


def find_stops(
    graph: CouplingGraph, quanta: Quanta, removed: Mask, floors: Sequence[int]
) -> dict[str, str]:
    """Names of the groups that can lose no more, with the reason; of the others nothing is said.

    Parameters
    ----------
    quanta, removed
        What may leave, and which of it is gone, shape ``(quanta + 1,)``.
    floors
        Units that every group keeps at least.
    """
    found = dict(quanta.untouched)
    kept = quanta.kept(removed)
    left = [int(kept[group.units].sum()) for group in graph.groups]
    steps = _next_steps(quanta, removed)
    for number, group in enumerate(graph.groups):
        if group.name not in found:
            reason = _reason(number, steps.get(number, []), left, floors)
            found |= {group.name: reason} if reason else {}
    return {group.name: found[group.name] for group in graph.groups if group.name in found}


def _reason(
    number: int, ahead: Sequence[Mapping[int, int]], left: Sequence[int], floors: Sequence[int]
) -> str:
    """Why a group can lose no more; empty where it can."""
    if not ahead:
        return "the rest of it is kept whole"
    if all(left[number] - shares[number] < floors[number] for shares in ahead):
        step = min(shares[number] for shares in ahead)
        in_steps = f", and goes in steps of {step}" if step > 1 else ""
        return f"it keeps {floors[number]} at least{in_steps}"
    stuck = all(any(left[g] - n < floors[g] for g, n in shares.items()) for shares in ahead)
    return "it is tied to a group that can lose no more" if stuck else ""


def _next_steps(quanta: Quanta, removed: Mask) -> dict[int, list[dict[int, int]]]:
    """For every group the next quantum of each of its chains: units by group's number."""
    steps: dict[int, list[dict[int, int]]] = {}
    for chain in quanta.chains:
        there = np.flatnonzero(~removed[chain])
        shares = dict(quanta.shares[int(chain[there[0]])]) if len(there) else {}
        for number in shares:
            steps.setdefault(number, []).append(shares)
    return steps
