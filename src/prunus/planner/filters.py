"""Which groups are meant: globs over their names and over the tensors on their axes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from operator import itemgetter
from typing import Any, TypeVar

from prunus.errors import PlanError
from prunus.graph.axis import Axis, Role
from prunus.graph.coupling import CouplingGraph
from prunus.planner.culprits import NOTHING_THERE, tell_pins
from prunus.planner.option_values import Globs

T = TypeVar("T")

_NEAR = 3
"""How many near names an error lists."""


def excluded_groups(graph: CouplingGraph, include: Globs | None, exclude: Globs) -> dict[str, str]:
    """Names of the groups that the globs leave out, with the reason."""
    wanted, unwanted = _each(include or ()), _each(exclude)
    included = {name for glob in wanted for name in taken(graph, glob, "include")}
    excluded = {name for glob in unwanted for name in taken(graph, glob, "exclude")}
    found: dict[str, str] = {}
    for group in graph.groups:
        if group.name in excluded:
            found[group.name] = "excluded"
        elif include is not None and group.name not in included:
            found[group.name] = "not included"
    return found


def taken(graph: CouplingGraph, glob: str, option: str) -> dict[str, str]:
    """The groups that a pattern takes, each with its name or the axis through which it fits.

    A group's literal name takes that group alone; then globs over names of groups are tried, over
    tensors that make or carry the units of a group, and over tensors that only read them.  What
    ``exclude`` keeps whole is all of that together.

    Raises
    ------
    PlanError
        If the pattern fits no group.
    """
    if any(group.name == glob for group in graph.groups):
        return {glob: glob}
    found: dict[int, dict[str, str]] = {}
    for group, called in _names(graph).items():
        fitting = [(way, axis) for name, axis, way in called if _fits(name, glob)]
        for way, axis in sorted(fitting, key=itemgetter(0))[:1]:
            found.setdefault(way, {})[group] = axis
    if not found:
        raise _only_pinned(graph, glob, option) or _nothing_matches(graph, glob, option)
    ways = sorted(found) if option == "exclude" else [min(found)]
    return {group: axis for way in ways for group, axis in found[way].items()}


_OWN, _MADE, _READ = range(3)
"""What fits: the group's name, or that of a tensor that makes or carries, or reads its units."""


def taken_through(graph: CouplingGraph, patterns: Mapping[str, Any]) -> list[str]:
    """Which groups patterns take by another name than the group's, and through which axis.

    Parameters
    ----------
    patterns
        Values of options by name: a pattern, several, or values by pattern.
    """
    return [
        f"{option} {glob!r} took the group {group} through {axis}"
        for option, value in patterns.items()
        for glob in (_each(value) if isinstance(value, Collection) else ())
        for group, axis in taken(graph, glob, option).items()
        if group != axis
    ]


def _each(globs: str | Collection[str]) -> Collection[str]:
    return (globs,) if isinstance(globs, str) else globs


def inside(graph: CouplingGraph, part: str | None) -> CouplingGraph:
    """The graph with those groups and blocks alone of which nothing lies outside of a module.

    Raises
    ------
    PlanError
        If no tensor is inside a module of that path, or no group and no block.
    """
    if part is None:
        return graph
    names = _called(graph)
    within = {n for n, called in names.items() if all(c.startswith(f"{part}.") for c in called)}
    groups = [g for g in graph.groups if all(axis.tensor in within for axis, _ in g.axes)]
    blocks = [block for block in graph.blocks if block.name.startswith(f"{part}.")]
    if not (groups or blocks):
        raise _no_part(graph, part, bool(within))
    return replace(graph, groups=tuple(groups), blocks=tuple(blocks))


def _no_part(graph: CouplingGraph, part: str, exists: bool) -> PlanError:
    paths = sorted({".".join(n.split(".")[:depth]) for n in graph.shapes for depth in (1, 2)})
    near = difflib.get_close_matches(part, paths, n=_NEAR, cutoff=0) or paths[:_NEAR]
    return PlanError(
        "nothing that can be pruned lies inside this part as a whole" if exists
        else f"the model has no part {part!r}",
        where=f"part={part!r}",
        why="every group of it reaches outside" if exists else f"near are {', '.join(near)}",
        fix="give the path of a module that holds whole layers",
    )  # fmt: skip


def _called(graph: CouplingGraph) -> dict[str, list[str]]:
    """By the name of every tensor, that and the other names of it."""
    names = {name: [name] for name in graph.shapes}
    for alias, first in graph.aliases.items():
        names[first].append(alias)
    return names


def spread(
    graph: CouplingGraph,
    values: T | Mapping[str, T],
    option: str,
    check: Callable[[str, T], None],
) -> dict[str, T]:
    """The value of an option for every group that it speaks of, by the group's name.

    A glob speaks of the groups that it takes (:func:`taken`).  Of several globs the most specific
    one decides: one that fits the group's name, then the one with more letters, then the first.

    Parameters
    ----------
    values
        One value for all groups, or values by globs over names of groups and tensors.
    check
        Called with the option's name and each value; raises if that is none.

    Raises
    ------
    PlanError
        If a glob fits no group.
    """
    if not isinstance(values, Mapping):
        check(option, values)
        return {group.name: values for group in graph.groups}
    best: dict[str, tuple[bool, int]] = {}
    found: dict[str, T] = {}
    for glob, value in values.items():
        check(f"{option}[{glob!r}]", value)
        for group, axis in taken(graph, glob, option).items():
            rank = group == axis, len(re.sub(r"[*?]", "", glob))
            if group not in best or rank > best[group]:
                best[group], found[group] = rank, value
    return {group.name: found[group.name] for group in graph.groups if group.name in found}


def first_fitting(graph: CouplingGraph, globs: Sequence[str], option: str) -> dict[str, int]:
    """For every group that one of the globs takes, by its name, which is the first.

    Raises
    ------
    PlanError
        If a glob fits no group.
    """
    found: dict[str, int] = {}
    for n, glob in enumerate(globs):
        for group in taken(graph, glob, option):
            found.setdefault(group, n)
    return found


def _names(graph: CouplingGraph) -> dict[str, list[tuple[str, str, int]]]:
    """By which names every group can be called: its own, its tensors', and tied ones.

    With each the axis that it is of, and in which way it fits.
    """
    called_by = _called(graph)
    found = {}
    for group in graph.groups:
        called = [(group.name, group.name, _OWN)]
        for axis, role in group.axes:
            way = _READ if role is Role.CONSUMER else _MADE
            called += [(name, f"{name}[{axis.dim}]", way) for name in called_by[axis.tensor]]
        found[group.name] = called
    return found


def _fits(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name, _literal_dims(glob))


def _literal_dims(glob: str) -> str:
    """The glob with the dims of axes taken literally, not as sets of characters.

    >>> fnmatchcase("conv1.weight[0]", _literal_dims("conv*[0]"))
    True
    """
    return re.sub(r"\[(\d+)\]", r"[[]\1]", glob)


def _only_pinned(graph: CouplingGraph, glob: str, option: str) -> PlanError | None:
    """The error for a glob over tensors of which no axis can be pruned; None where it fits none."""
    known = [*graph.shapes, *graph.aliases]
    named = [Axis(n, dim) for n in known for dim in range(len(graph.shapes.get(n, ())))]
    fitting = [axis for axis in named if _fits(axis.tensor, glob) or _fits(str(axis), glob)]
    if not fitting or any(axis in graph.labels for axis in fitting):
        return None
    return PlanError(
        f"{glob!r} matches only what is pinned",
        where=f"{option}=",
        why="\n".join(tell_pins(graph, fitting)) or NOTHING_THERE,
        fix="give globs over groups that can be pruned: `prunus inspect` lists them",
    )


def _nothing_matches(graph: CouplingGraph, glob: str, option: str) -> PlanError:
    names = _names(graph)
    every = list(dict.fromkeys(name for called in names.values() for name, _, _ in called))
    near = difflib.get_close_matches(glob, every, n=_NEAR, cutoff=0.4)
    return PlanError(
        f"{glob!r} matches no group and no tensor of one",
        where=f"{option}=",
        why=f"near to it are {', '.join(near)}" if near else f"there are {len(names)} groups",
        fix="globs are matched against whole names: 'layer1.*' or '*conv1.weight*'",
    )
