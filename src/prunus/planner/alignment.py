"""Alignment: of which numbers the cut dims have to be multiples, by layer, by group, by width."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np

from prunus.graph.axis import Axis, Label, Role
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Aligned, Group
from prunus.graph.program import Ref
from prunus.planner.filters import spread
from prunus.planner.option_values import check_count

WIDE = 32
"""Narrower widths are not rounded unless somebody asks for it."""


@dataclass(frozen=True)
class Default:
    """Multiples where nobody asked for any, by names of groups; others are not rounded.

    Only what is made has to be a multiple, the widths of 32 and more of channels and of FFNs: an
    input that is read beside what a group makes, three channels of an image say, keeps no group
    from being cut.
    """

    multiples: Mapping[str, int]

    def __str__(self) -> str:
        return f"{max(self.multiples.values())} by default" if self.multiples else "1"


RoundTo = int | Mapping[str, int] | Default
"""One number for all, or numbers by kind of layer (``"linear"``, ``"conv"``) and by glob."""

KINDS = ("conv", "linear")

FINEST = 16
"""A multiple that is too coarse for a narrow group is halved, but not below this."""


def aligned_labels(
    graph: CouplingGraph, untouched: Mapping[str, str], round_to: RoundTo
) -> list[tuple[Label, int]]:
    """Labels that have to be multiples, and of what: where kernels demand it or it pays.

    It pays on the axes of contractions, both sides.  A group that is on no contraction is aligned
    on whatever carries it.  Carriers beside a contraction follow it, or (a bias table with a row
    per head) don't matter.

    Parameters
    ----------
    untouched
        Names of groups that stay as they are.
    round_to
        Globs decide before kinds of layers, and these before ``"*"``.  A group narrower than
        twice the number (its width on its widest producing axis, heads × dim counting as one) is
        rounded to half of it, and so on, down to 16: 32 is for groups at least 64 wide.
    """
    found = [(c.label, c.multiple) for c in graph.constraints if isinstance(c, Aligned)]
    if isinstance(round_to, Default):
        return [*found, *_default_labels(graph, untouched, round_to.multiples)]
    by_glob, by_kind = _read(graph, round_to)
    if not by_glob and set(by_kind.values()) <= {1}:
        return found
    kinds = _kinds(graph) if by_kind.keys() & set(KINDS) else {}
    widths = _widths(graph)
    strict: dict[tuple[tuple[int, ...], bytes], tuple[Label, int]] = {}
    for group in (group for group in graph.groups if group.name not in untouched):
        for axis in _rounded_axes(group):
            kind = kinds.get(axis.tensor, "linear")
            asked = by_glob.get(group.name, by_kind.get(kind, by_kind.get("*", 1)))
            label = graph.labels[axis]
            asked = _halved(asked, int(widths[label[label > 0]].min()))
            key = (label.shape, label.tobytes())
            strict[key] = label, lcm(strict.get(key, (label, 1))[1], asked)
    return [*found, *(pair for pair in strict.values() if pair[1] > 1)]


def _rounded_axes(group: Group) -> list[Axis]:
    """Those of contractions; all where there is none."""
    axes = [axis for axis, role in group.axes if role is not Role.CARRIER]
    return axes or [axis for axis, _ in group.axes]


def _halved(multiple: int, width: int) -> int:
    """A multiple that is not too coarse for a width.

    >>> _halved(32, 64), _halved(32, 63), _halved(32, 8)
    (32, 16, 16)
    """
    while multiple % 2 == 0 and multiple // 2 >= FINEST and width < 2 * multiple:
        multiple //= 2
    return multiple


def _default_labels(
    graph: CouplingGraph, untouched: Mapping[str, str], multiples: Mapping[str, int]
) -> Iterator[tuple[Label, int]]:
    """Units of every wide group, and wide axes that several groups make together, side by side or
    as blocks times what is in each.

    An axis counts where it is a multiple for certain once its groups are: not where one of them is
    not rounded, or where what always stays is no multiple.
    """
    of_unit = np.ones(graph.unit_count + 1, dtype=np.int64)
    live = np.zeros(graph.unit_count + 1, dtype=np.bool_)
    for group in graph.groups:
        live[group.units] = group.name not in untouched
        of_unit[group.units] = multiple = multiples.get(group.name, 1)
        if group.name not in untouched and multiple > 1 and group.size >= WIDE:
            yield group.units[:, None], multiple
    seen: set[bytes] = set()
    for group in graph.groups:
        for axis in (axis for axis, role in group.axes if role is Role.PRODUCER):
            label = graph.labels[axis]
            units = label[live[label]]
            several = len(np.setdiff1d(units, group.units)) > 0
            if len(label) < WIDE or not several:
                continue
            multiple = int(of_unit[units].min())
            fixed = int((~live[label]).all(axis=1).sum())
            if multiple > 1 and fixed % multiple == 0 and label.tobytes() not in seen:
                seen.add(label.tobytes())
                yield label, multiple


def wide_groups(graph: CouplingGraph, names: Collection[str]) -> list[str]:
    """Those of 32 units and more, or that make an axis of 32 and more together with others."""
    widths = _widths(graph)
    return [
        group.name
        for group in graph.groups
        if group.name in names and (group.size >= WIDE or widths[group.units].max() >= WIDE)
    ]


def _read(
    graph: CouplingGraph, round_to: int | Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Multiples by group, where a glob says so, and by kind of layer with ``"*"`` for the rest."""
    if not isinstance(round_to, Mapping):
        check_count("round_to", round_to)
        return {}, {"*": round_to}
    by_kind = {key: value for key, value in round_to.items() if key in (*KINDS, "*")}
    for key, value in by_kind.items():
        check_count(f"round_to[{key!r}]", value)
    globs = {key: value for key, value in round_to.items() if key not in by_kind}
    return spread(graph, globs, "round_to", check_count), by_kind


def _widths(graph: CouplingGraph) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For every unit the width of its group: the size of its widest producing axis."""
    widths = np.zeros(graph.unit_count + 1, dtype=np.int64)
    for group in graph.groups:
        makers = [axis for axis, role in group.axes if role is Role.PRODUCER]
        sizes = [len(graph.labels[axis]) for axis in makers or [axis for axis, _ in group.axes]]
        widths[group.units] = max(sizes)
    return widths


def _kinds(graph: CouplingGraph) -> dict[str, str]:
    """Which tensors convolutions read as weights, also through a view of them.

    Of a graph without a program it is told by the number of dims.
    """
    if graph.program is None:
        convolved = {axis.tensor for axis in graph.labels if len(graph.shapes[axis.tensor]) > 2}
        return dict.fromkeys(convolved, "conv")
    made_of = {number: {name} for number, name in graph.program.state.items()}
    found: dict[str, str] = {}
    for node in graph.program.nodes:
        read = [ref.value for ref in node.args.values() if isinstance(ref, Ref)]
        weight = node.args.get("weight")
        if "conv" in node.target.name() and isinstance(weight, Ref):
            found |= dict.fromkeys(made_of.get(weight.value, ()), "conv")
        if read and all(number in made_of for number in read):
            names = set().union(*(made_of[number] for number in read))
            made_of |= dict.fromkeys(node.outputs, names)
    return found
