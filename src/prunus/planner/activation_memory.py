"""A bound on peak memory: moments are bounded one after the other, the worst first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from prunus.graph.coupling import CouplingGraph
from prunus.graph.polynomial import PEAK
from prunus.planner.allocate import Selection

AT_ONCE = 4
"""How many moments are added to the bounded ones at most, where several are above the bound."""

Choose = Callable[[CouplingGraph, Mapping[str, int]], Selection]


def hold_peak(graph: CouplingGraph, limits: Mapping[str, int], choose: Choose) -> Selection:
    """Choose what stays under bounds of which one may be on the most that is alive at a moment.

    That most is no polynomial, but the bytes of every moment are one.  So the worst moments are
    bounded like any cost, and as long as others are above the bound then, these as well.

    Parameters
    ----------
    limits
        The largest allowed value of every cost.
    choose
        Chooses under bounds on costs that are polynomials.

    Raises
    ------
    BudgetError
        If the floors don't allow the budget; it says at which moment.
    """
    if PEAK not in limits:
        return choose(graph, limits)
    most = limits[PEAK]
    moments = graph.moments
    named = {f"{PEAK} at {name}": polynomial for name, polynomial in moments.bytes.items()}
    graph = replace(graph, width_labels=moments.labels, costs={**graph.costs, **named})
    bounds = {name: limit for name, limit in limits.items() if name != PEAK}
    kept = graph.all_kept
    found = choose(graph, bounds) if bounds else Selection(kept)
    while True:
        values = moments.values(found.kept)
        above = [
            n for n, value in values.items() if value > most and f"{PEAK} at {n}" not in bounds
        ]
        if not above:
            return found
        above.sort(key=lambda name: -values[name])
        bounds |= {f"{PEAK} at {name}": most for name in above[:AT_ONCE]}
        found = choose(graph, bounds)
