"""What stands in the way of a request, in lines for an error: groups that keep all, and pins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod

import numpy as np

from prunus.errors import BudgetError
from prunus.graph.axis import Axis, Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Aligned, Group, Pin

_REASONS = 8
"""How many reasons an error spells out; the rest is counted."""

_BLAMED = 5
"""How many groups an error names that hold most of a cost."""

_NAMED = 3
"""How many groups or axes of one reason are named; the rest is counted."""


def nothing_removed(graph: CouplingGraph, asked: str, reasons: Mapping[str, str]) -> BudgetError:
    """The error for a request that removes nothing.

    Parameters
    ----------
    asked
        The request, for people.
    reasons
        Why groups keep all of their units; of groups that are missing the graph knows more.
    """
    found = {group.name: reasons.get(group.name, _why_whole(graph, group.name)) for group in
             graph.groups}  # fmt: skip
    lines = [*tell_groups(found), *tell_pins(graph)]
    return BudgetError(
        f"{asked} removes nothing",
        why="\n".join(lines) or NOTHING_THERE,
        fix="ask for more, let more groups be pruned, or change the lines of the model's code "
        "that pin an axis: `prunus inspect` lists all of them",
    )


NOTHING_THERE = "the traced forward reads no parameter of which a dim could be pruned"


def tell_groups(reasons: Mapping[str, str]) -> list[str]:
    """Groups by what keeps them whole: a line for each reason, those of most groups first.

    >>> tell_groups({"a.weight[0]": "excluded", "b.weight[0]": "excluded"})
    ['a.weight[0], b.weight[0]: excluded']
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    order = sorted(by_reason, key=lambda reason: -len(by_reason[reason]))
    lines = [f"{_some(by_reason[reason], 'group')}: {reason}" for reason in order[:_REASONS]]
    left = sum(len(by_reason[reason]) for reason in order[_REASONS:])
    if left:
        lines.append(f"{left} groups more, of {len(order) - _REASONS} other reasons")
    return lines


def tell_pins(graph: CouplingGraph, axes: Iterable[Axis] | None = None) -> list[str]:
    """Pins by reason and operator: a line for each, with its module and source line.

    Parameters
    ----------
    axes
        Only the pins that reach these; all of the graph by default.  Those that pin most numbers
        come first.
    """
    pins: Sequence[tuple[Axis, Pin]] = graph.pins
    if axes is not None:
        pins = list(dict.fromkeys(pin for axis in axes for pin in graph.why_pinned(axis)))
    by_reason: dict[tuple[str, str], list[tuple[Axis, Pin]]] = {}
    for axis, pin in pins:
        by_reason.setdefault((pin.reason, pin.operator), []).append((axis, pin))

    def weight(entries: Sequence[tuple[Axis, Pin]]) -> int:
        # Of values in it a tensor that the graph doesn't know has none.
        shapes = (graph.shapes.get(axis.tensor, (0,)) for axis in {axis for axis, _ in entries})
        return sum(map(prod, shapes))

    ordered = sorted(by_reason.values(), key=lambda entries: -weight(entries))
    lines = [_tell_pin(entries) for entries in ordered[:_REASONS]]
    left = sum(map(len, ordered[_REASONS:]))
    if left:
        lines.append(f"{left} pins more, of {len(ordered) - _REASONS} other reasons")
    return lines


def _tell_pin(entries: Sequence[tuple[Axis, Pin]]) -> str:
    """Pins of one reason in a line."""
    names = list(dict.fromkeys(str(axis) for axis, _ in entries))
    places = len({(pin.module, pin.source) for _, pin in entries})
    more = f", and in {places - 1} more places" if places > 1 else ""
    return f"{_some(names, 'axis')} pinned: {entries[0][1]}{more}"


def out_of_reach(
    graph: CouplingGraph,
    rows: Sequence[tuple[str, int, int, int]],
    *,
    worst: int,
    floors: str,
    kept: Mask,
    reasons: Mapping[str, str],
) -> BudgetError:
    """The error for bounds that floors don't allow.

    Parameters
    ----------
    rows
        The name of each cost, what is reached, its bound, and the dense cost.
    worst
        The row that is furthest away.
    floors
        The options that stop it.
    kept
        What is kept there.
    reasons
        Why groups lose nothing whatever the bounds.
    """
    asked = [f"{name} ≤ {limit} ({limit / dense:.1%} of {dense})" for name, _, limit, dense in rows]
    reached = [f"{name} {cost} ({cost / dense:.1%})" for name, cost, _, dense in rows]
    name, cost, _, dense = rows[worst]
    shares = []
    for number, group in enumerate(graph.groups):
        without = kept.copy()
        without[group.units] = False
        shares.append((graph.cost(name, without) - cost, number))
    lines = []
    for share, number in sorted(shares)[:_BLAMED]:
        group = graph.groups[number]
        keeps = f"keeps {int(kept[group.units].sum())} of {group.size} units"
        reason = reasons.get(group.name, keeps)
        lines.append(f"{group.name}: {reason}, {-share / dense:.1%} of the dense {name}")
    if len(shares) > _BLAMED:
        lines.append(f"and {len(shares) - _BLAMED} groups more")
    stop = f"the floors ({floors}) stop at {', '.join(reached)}"
    left = [*lines, *tell_pins(graph)] or [NOTHING_THERE]
    return BudgetError(
        f"no plan reaches {' and '.join(asked)}",
        why="\n".join([f"{stop}; what is left there:", *left]),
        fix="ask for less, lower the floors, or let more groups be pruned",
    )


def _why_whole(graph: CouplingGraph, name: str) -> str:
    """Why a group keeps all of its units that nothing else speaks of."""
    group = graph.group(name)
    if group.size == 1:
        return "its only unit is kept"
    for constraint in graph.constraints:
        if isinstance(constraint, Aligned) and np.isin(group.units, constraint.label).any():
            return f"{constraint.reason}: only multiples of {constraint.multiple}"
    return f"no smaller number than its {group.size} units comes near enough to what was asked"


def _some(names: Sequence[str], noun: str) -> str:
    left = len(names) - _NAMED
    plural = {"axis": "axes"}.get(noun, f"{noun}s")
    more = f" and {left} more {plural if left > 1 else noun}" if left > 0 else ""
    return ", ".join(names[:_NAMED]) + more


MOST_CULPRITS = 16
"""When more groups than this fail one by one, the model as a whole is not understood."""


def find_culprits(graph: CouplingGraph, kept: Mask, fails: Callable[[Mask], str]) -> dict[str, str]:
    """Groups that have to stay whole so that a selection doesn't fail, with what went wrong.

    Parameters
    ----------
    graph, kept
        The selection that fails.
    fails
        What is wrong with a selection; empty if nothing is.  It is asked about log2(groups)
        times for each culprit.

    Returns
    -------
    dict
        Group name → reason, empty if the selection doesn't fail.  Where more than sixteen
        groups are to blame, every touched group is named.
    """
    touched = [group for group in graph.groups if not kept[group.units].all()]
    culprits: dict[str, str] = {}

    def removing(groups: Sequence[Group]) -> Mask:
        mask = graph.all_kept
        for group in groups:
            if group.name not in culprits:
                mask[group.units] = kept[group.units]
        return mask

    while reason := fails(removing(touched)):
        if len(culprits) == MOST_CULPRITS:
            return {group.name: reason for group in touched}
        low, high = 0, len(touched)  # removing the first `high` fails, the first `low` does not
        while high - low > 1:
            middle = (low + high) // 2
            found = fails(removing(touched[:middle]))
            if found:
                high, reason = middle, found
            else:
                low = middle
        culprits[touched[high - 1].name] = reason
    return culprits
