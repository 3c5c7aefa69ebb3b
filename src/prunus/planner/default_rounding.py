"""Widths under a budget where nobody says of what they are multiples: of 8, where that is free.

Kernels take multiples of 8 channels at a time: what a budget of MACs saves is not saved by the
clock where widths are none.  But the bound comes first: it is met as closely as it is with any
rounding, and where a step of 8 is too coarse for that, the groups of which it is are rounded to
less.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from prunus.errors import BudgetError
from prunus.graph.coupling import CouplingGraph
from prunus.planner.alignment import Default, wide_groups
from prunus.planner.allocate import Selection

MULTIPLE = 8

TOLERANCE = 0.02
"""How far under its bound a cost may lie, as a part of the dense one."""

_STUCK = "it can't be cut to multiples"

Choose = Callable[[Default], Selection]


def choose_rounded(
    graph: CouplingGraph, limits: Mapping[str, int], names: Collection[str], choose: Choose
) -> Selection:
    """The choice of units with widths as coarse as the bounds allow.

    Parameters
    ----------
    limits
        The largest allowed value of every cost, by names that the graph knows.
    names
        Groups that may be rounded.
    choose
        Chooses under the bounds with these multiples.

    Raises
    ------
    BudgetError
        If the floors don't allow the budget without any rounding.
    """
    best: tuple[float, Selection] | None = None
    for multiples in _attempts(graph, limits, names):
        try:
            found = _without_stuck(multiples, choose)
        except BudgetError:
            if not multiples:
                raise
            continue
        spare = 0.0 if found.kept.all() else _spare(graph, limits, found)
        if best is None or spare < best[0]:
            best = spare, found
        if spare <= TOLERANCE:
            break
    assert best is not None, "the last attempt raises or finds"
    return best[1]


def _without_stuck(multiples: Mapping[str, int], choose: Choose) -> Selection:
    """A choice in which no group stays whole since it can't be cut to its multiple.

    (Six blocks of eight channels make no multiple of 8 in fewer blocks, nor in smaller ones; but
    one of 4.)
    """
    while True:
        found = choose(Default(multiples))
        stuck = [n for n, why in found.stopped.items() if n in multiples and _STUCK in why]
        if not stuck:
            return found._replace(rounded=multiples)
        finer = {name: n // 2 if name in stuck else n for name, n in multiples.items()}
        multiples = {name: n for name, n in finer.items() if n > 1}


def _attempts(
    graph: CouplingGraph, limits: Mapping[str, int], names: Collection[str]
) -> Iterator[Mapping[str, int]]:
    """Multiples of all groups; finer and finer ones where a step is too coarse; none."""
    wide = wide_groups(graph, names)
    finest = {name: _finest(graph, limits, name) for name in wide}
    multiple, tried = MULTIPLE, dict[str, int]()
    while multiple > 1:
        found = {name: max(multiple, least) for name, least in finest.items()}
        if found and found != tried:
            yield found
        multiple, tried = multiple // 2, found
    yield {name: least for name, least in finest.items() if least > 1}
    if any(least > 1 for least in finest.values()):
        yield {}


def _finest(graph: CouplingGraph, limits: Mapping[str, int], name: str) -> int:
    """The largest multiple, a power of two, of which a step costs no more than the tolerance."""
    units = graph.group(name).units
    multiple = MULTIPLE
    while multiple > 1:
        kept = graph.all_kept
        kept[units[:multiple]] = False
        saved = (1 - graph.cost(cost, kept) / max(graph.cost(cost), 1) for cost in limits)
        if max(saved, default=0.0) <= TOLERANCE:
            break
        multiple //= 2
    return multiple


def _spare(graph: CouplingGraph, limits: Mapping[str, int], found: Selection) -> float:
    """Room under the tightest bound, as a part of the dense cost."""
    return min(
        (
            (most - graph.cost(name, found.kept)) / max(graph.cost(name), 1)
            for name, most in limits.items()
        ),
        default=0.0,
    )
