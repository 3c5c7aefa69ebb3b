"""Which groups are meant: globs over their names and over the tensors on their axes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeVar

from prunus.errors import PlanError
from prunus.graph.axis import Axis
from prunus.graph.coupling import CouplingGraph
from prunus.planner.culprits import NOTHING_THERE, tell_pins
from prunus.planner.option_values import Globs

T = TypeVar("T")

_NEAR = 3
"""How many near names an error lists."""


def excluded_groups(graph: CouplingGraph, include: Globs | None, exclude: Globs) -> dict[str, str]:
    """Names of the groups that the globs leave out, with the reason."""
    names = _names(graph)
    wanted = None if include is None else _matching(graph, names, include, "include")
    unwanted = _matching(graph, names, exclude, "exclude")
    found: dict[str, str] = {}
    for group in names:
        if group in unwanted:
            found[group] = "excluded"
        elif wanted is not None and group not in wanted:
            found[group] = "not included"
    return found


def inside(graph: CouplingGraph, part: str | None) -> CouplingGraph:
    """The graph with those groups and blocks alone of which nothing lies outside of a module.

    Raises
    ------
    PlanError
        If no tensor is inside a module of that path, or no group and no block.
    """
    if part is None:
        return graph
    names = {name: [name] for name in graph.shapes}
    for alias, first in graph.aliases.items():
        names[first].append(alias)
    within = {n for n, called in names.items() if all(c.startswith(f"{part}.") for c in called)}
    groups = [g for g in graph.groups if all(axis.tensor in within for axis, _ in g.axes)]
    blocks = [block for block in graph.blocks if block.name.startswith(f"{part}.")]
    if not (groups or blocks):
        paths = sorted({".".join(n.split(".")[:depth]) for n in graph.shapes for depth in (1, 2)})
        near = difflib.get_close_matches(part, paths, n=_NEAR, cutoff=0) or paths[:_NEAR]
        raise PlanError(
            "nothing that can be pruned lies inside this part as a whole" if within
            else f"the model has no part {part!r}",
            where=f"part={part!r}",
            why="every group of it reaches outside" if within else f"near are {', '.join(near)}",
            fix="give the path of a module that holds whole layers",
        )  # fmt: skip
    return replace(graph, groups=tuple(groups), blocks=tuple(blocks))


def spread(
    graph: CouplingGraph,
    values: T | Mapping[str, T],
    option: str,
    check: Callable[[str, T], None],
) -> dict[str, T]:
    """The value of an option for every group that it speaks of, by the group's name.

    A glob speaks of the groups whose names it fits; one that fits no group's name, of those with a
    tensor that it fits.  Of several globs the most specific one decides: one that fits the group's
    name, then the one with more letters, then the first.

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
    names = _names(graph)
    best: dict[str, tuple[bool, int]] = {}
    found: dict[str, T] = {}
    for glob, value in values.items():
        check(f"{option}[{glob!r}]", value)
        own = {group for group in names if _fits(group, glob)}
        rank = bool(own), len(re.sub(r"[*?]", "", glob))
        for group in own or _matching(graph, names, glob, option):
            if group not in best or rank > best[group]:
                best[group], found[group] = rank, value
    return {group.name: found[group.name] for group in graph.groups if group.name in found}


def first_fitting(graph: CouplingGraph, globs: Sequence[str], option: str) -> dict[str, int]:
    """For every group that one of the globs speaks of, by its name, which is the first.

    As in :func:`spread`, a glob speaks of the groups whose names it fits; one that fits no group's
    name, of those with a tensor that it fits.

    Raises
    ------
    PlanError
        If a glob fits no group.
    """
    names = _names(graph)
    found: dict[str, int] = {}
    for n, glob in enumerate(globs):
        own = {group for group in names if _fits(group, glob)}
        for group in own or _matching(graph, names, glob, option):
            found.setdefault(group, n)
    return found


def _names(graph: CouplingGraph) -> dict[str, tuple[str, ...]]:
    """By which names every group can be called: its own, its tensors', and tied ones."""
    tied: dict[str, list[str]] = {}
    for alias, first in graph.aliases.items():
        tied.setdefault(first, []).append(alias)
    found = {}
    for group in graph.groups:
        tensors = [axis.tensor for axis, _ in group.axes]
        aliases = [alias for tensor in tensors for alias in tied.get(tensor, ())]
        found[group.name] = tuple(dict.fromkeys([group.name, *tensors, *aliases]))
    return found


def _matching(
    graph: CouplingGraph, names: dict[str, tuple[str, ...]], globs: Globs, option: str
) -> set[str]:
    found: set[str] = set()
    for glob in (globs,) if isinstance(globs, str) else globs:
        hits = {
            group for group, called in names.items() if any(_fits(name, glob) for name in called)
        }
        if not hits:
            raise _only_pinned(graph, glob, option) or _nothing_matches(names, glob, option)
        found |= hits
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


def _nothing_matches(names: dict[str, tuple[str, ...]], glob: str, option: str) -> PlanError:
    every = list(dict.fromkeys(name for called in names.values() for name in called))
    near = difflib.get_close_matches(glob, every, n=_NEAR, cutoff=0.4)
    return PlanError(
        f"{glob!r} matches no group and no tensor of one",
        where=f"{option}=",
        why=f"near to it are {', '.join(near)}" if near else f"there are {len(names)} groups",
        fix="globs are matched against whole names: 'layer1.*' or '*conv1.weight*'",
    )
