"""Ratios that are given: which quanta leave for good, whatever the budget says."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping

from prunus.errors import PlanError
from prunus.graph.coupling import CouplingGraph
from prunus.planner.steps import Quanta


def choose_fixed(
    graph: CouplingGraph, quanta: Quanta, ratios: Mapping[str, float], *, exactly: bool = True
) -> tuple[list[int], set[int]]:
    """The quanta that bring groups to their ratios, and the chains that are settled by that.

    Every group loses the number of units nearest to its ratio that whole quanta give: without
    rounding and locksteps that is the nearest whole number.

    Parameters
    ----------
    ratios
        By names of groups, each in [0, 1).
    exactly
        Whether a group that can't lose as many is an error; else it loses what it can, but one unit
        at least, and not the last.

    Raises
    ------
    PlanError
        If a group can't lose as many, or has to lose as many as another one of another ratio.
    """
    number = {group.name: n for n, group in enumerate(graph.groups)}
    chains: dict[int, list[int]] = {}
    for index, chain in enumerate(quanta.chains):
        for group in quanta.groups_of(chain):
            chains.setdefault(group, []).append(index)
    gone: Counter[int] = Counter()
    taken: dict[int, None] = {}
    for name, ratio in ratios.items():
        group = number[name]
        missing = _target(graph.groups[group].size, ratio, exactly) - gone[group]
        for quantum in _approach(quanta, group, missing, chains.get(group, []), taken, up=exactly):
            taken[quantum] = None
            gone.update(dict(quanta.shares[quantum]))
    if exactly:
        for name, ratio in ratios.items():
            group = number[name]
            _check(graph, quanta, group, ratio, gone[group], chains.get(group, []))
    settled = {chain for name in ratios for chain in chains.get(number[name], [])}
    return list(taken), settled


def _target(size: int, ratio: float, exactly: bool) -> float:
    """How many units are to be lost.

    >>> _target(4, 0.1, True), _target(4, 0.1, False), _target(1, 0.9, False)
    (0.4, 1, 0)
    """
    if exactly:
        return ratio * size
    return min(max(1, round(ratio * size)), size - 1)


def _approach(
    quanta: Quanta,
    group: int,
    missing: float,
    chains: list[int],
    taken: Mapping[int, None],
    *,
    up: bool,
) -> list[int]:
    """Quanta, from chains alike, whose units in the group come nearest to a number.

    Of two numbers equally near the larger one is taken where ``up``.
    """
    found: dict[int, None] = {}
    heap = [(0.0, chain, 0) for chain in chains]
    while heap:
        _, chain, at = heapq.heappop(heap)
        ids = quanta.chains[chain]
        if at >= len(ids):
            continue
        quantum = int(ids[at])
        if quantum not in taken and quantum not in found:
            units = dict(quanta.shares[quantum]).get(group, 0)
            nearer = abs(missing) - abs(missing - units)
            if not units or nearer < 0 or (nearer == 0 and not up):
                continue
            missing -= units
            found[quantum] = None
        heapq.heappush(heap, ((at + 1) / len(ids), chain, at + 1))
    return list(found)


def _check(
    graph: CouplingGraph, quanta: Quanta, group: int, ratio: float, gone: int, chains: list[int]
) -> None:
    """Refuse a result that is further from the ratio than quanta have to be."""
    name, size = graph.groups[group].name, graph.groups[group].size
    own = {int(quantum) for chain in chains for quantum in quanta.chains[chain]}
    units = [dict(quanta.shares[quantum]).get(group, 0) for quantum in own]
    coarse, most = max([1, *units]), sum(units)
    if 2 * abs(ratio * size - gone) <= coarse + 1e-6:
        return
    tied = {graph.groups[g].name for quantum in own for g, _ in quanta.shares[quantum]} - {name}
    if name in quanta.untouched:
        why = quanta.untouched[name]
    elif tied and most >= ratio * size - coarse:
        why = f"it loses units together with {', '.join(sorted(tied))}"
    else:
        why = f"{size - most} of its units have to stay"
    raise PlanError(
        f"the group can't lose {ratio:g} of its {size} units",
        where=f"group {name}",
        why=f"{why}; {gone} would go, at most {most} can",
        fix="give another ratio, one ratio to groups that are tied, or no rounding",
    )
