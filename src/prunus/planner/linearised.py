"""From the dense widths to the bounds in steps, on curves that are taken anew at every step.

Costs are linear only near the widths at which they are looked at, so no step changes a width by
more than a part of it (a trust region), and once the bounds are reached some more steps settle
what neighbours are worth to each other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Mask
from prunus.planner.curves import Curves, CurveSource

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Choose = Callable[[Curves, Floats, Mask, Ints], Ints]
"""From curves, the room under each bound, the prefixes allowed and the present ones to the next."""

TRUST = 0.15
"""How much of what a chain has left may go, or come back, in one step."""

_SETTLING = 6
"""Steps at the bounds themselves."""

_STRIDE = 0.8
"""How much of what a step could save at most is asked of it, where the bounds are further away."""

_STEPS = 60
"""Steps at most; the last units of a chain leave one by one."""


def descend(
    source: CurveSource,
    left: Floats,
    limits: Floats,
    start: Ints,
    choose: Choose,
) -> list[Ints]:
    """Lengths of the prefixes at every step at the bounds, the last step last.

    Parameters
    ----------
    source
        Whose curves are taken.
    left
        Units that each prefix leaves of its chain's groups, as the curves are laid out; 0 for a
        prefix that is too long.
    limits
        The bounds.
    start
        Lengths to begin with.
    choose
        How a step is chosen.
    """
    counts = start
    found: list[Ints] = []
    bias = np.zeros(len(limits))
    for _ in range(_STEPS):
        curves = source.curves(counts)
        allowed = _trusted(curves, left, counts)
        room, far = _room(source, curves, limits, allowed)
        following = choose(curves, room if far else room + bias, allowed, counts)
        expected = source.costs + curves.cost[:, curves.at(following)].sum(axis=1)
        bias = expected - source.costs_at(following)
        if not far:
            found.append(following)
        if len(found) == _SETTLING or np.array_equal(following, counts):
            break
        counts = following
    return found or [counts]


def _trusted(curves: Curves, left: Floats, counts: Ints) -> Mask:
    """Prefixes within the trust region; one quantum either way is always within."""
    at = curves.at(counts)
    lengths = np.diff(curves.start)
    index = np.arange(curves.start[-1]) - np.repeat(curves.start[:-1], lengths)
    present = np.repeat(left[at], lengths)
    close = np.abs(left - present) <= TRUST * present
    next_to = np.abs(index - np.repeat(counts, lengths)) <= 1
    allowed = (close | next_to) & (left > 0) & curves.possible
    allowed[at] = True
    return np.asarray(allowed)


def _room(
    source: CurveSource, curves: Curves, limits: Floats, allowed: Mask
) -> tuple[Floats, bool]:
    """What each cost may grow in this step, and whether the bounds are out of its reach."""
    room = limits - source.costs
    least = np.where(allowed, curves.cost, 0.0)
    reach = np.minimum.reduceat(least, curves.start[:-1], axis=1).sum(axis=1)
    out = room < reach * _STRIDE
    return np.where(out, reach * _STRIDE, room), bool(out.any())
