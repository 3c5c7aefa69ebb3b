"""The coupling graph: what a traced model says about itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from prunus.errors import BudgetError, PlanError, checks_options
from prunus.graph.axis import Axis, Label, Mask, Role, kept_positions
from prunus.graph.budget import IN, find_inside
from prunus.graph.expressions import Attribute, Condition, Equation
from prunus.graph.groups import Constraint, Group, Pin, Rescale
from prunus.graph.polynomial import (
    PEAK,
    FindMoments,
    Polynomial,
    TimePoints,
    add_up,
    measure_widths,
)


@checks_options
@dataclass(frozen=True, slots=True)
class Block:
    """A child of a list or sequence of modules that adds something to what it is given.

    Attributes
    ----------
    name
        Its module path, ``"model.layers.3"``.
    container
        The path of the list or sequence that it stands in: its *stack*.
    index
        Its place there.
    siblings
        How many children the stack has, itself and those that can't be dropped included.
    dim
        Of its output: the dim along which features lie.
    """

    name: str
    container: str
    index: int
    siblings: int
    dim: int = -1

    @property
    def at_end(self) -> bool:
        """Whether it is the first or the last of its stack."""
        return self.index in (0, self.siblings - 1)


@dataclass(frozen=True, slots=True)
class Coupling:
    """Two axes tied by an operator; position ``left[i]`` lives with position ``right[i]``."""

    a: Axis
    b: Axis
    operator: str
    module: str
    left: NDArray[np.int64] = field(compare=False)
    right: NDArray[np.int64] = field(compare=False)

    def __str__(self) -> str:
        place = f" in {self.module}" if self.module else ""
        return f"{self.a} — {self.b} by {self.operator}{place}"


@checks_options
@dataclass(frozen=True)
class CouplingGraph:
    """Axes, couplings, groups, units and constraints of one traced model.

    Attributes
    ----------
    shapes, parameters
        Shape of every parameter, buffer and tensor attribute; names of those that are parameters.
    aliases
        Tied names: ``aliases["lm_head.weight"] == "embed.weight"``.  Axes use the first name.
    labels
        The prunable axes only; an axis that is missing keeps all its positions.
    width_labels
        The distinct labelled dims that the cost polynomials speak of by index.
    costs
        ``"params"``, ``"bytes"`` (of parameters and buffers, as they are stored) and ``"macs"``
        (for the traced inputs, batch included) as polynomials in the widths of ``width_labels``.
    unit_count
        Units have the ids 1 … ``unit_count``.
    couplings, pins
        Every coupling in the order in which it was found; every pin.
    kept_outputs, unknown
        Outputs whose shape is held; operators without a rule, with how often they ran.
    equations, attributes
        What the forward's code demands of module attributes, and their present values.
    conditions
        Comparisons of sizes by which the forward's code takes one path or another.
    rescales
        Weights that make up for a softmax scale that would move with its head dim.
    blocks
        Residual blocks that can be dropped as a whole, in the model's order.
    obstacles
        Why the other children of lists and sequences of modules can't, by their paths.
    renormalised
        Groups whose removal changes kept weights, which the forward computes from weights.
    traced
        The inputs and the shapes of the kept outputs, as plain data.
    parts
        Every cost by what has it: params and bytes by tensor, MACs by the module that runs.
    program
        The operators that ran (:class:`prunus.graph.program.Program`), for replay.
    find_moments
        Finds how many bytes of tensors are alive at which moment, where that is asked for.
    forward_fn
        What was run in place of the model's forward, if anything.
    seconds
        What it took: ``"trace"`` for the forward and its rules, ``"group"`` for the rest.
    """

    shapes: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str]
    aliases: Mapping[str, str]
    labels: Mapping[Axis, Label]
    roles: Mapping[Axis, Role]
    groups: tuple[Group, ...]
    unit_count: int
    constraints: tuple[Constraint, ...]
    width_labels: tuple[Label, ...]
    costs: Mapping[str, Polynomial]
    couplings: tuple[Coupling, ...]
    pins: tuple[tuple[Axis, Pin], ...]
    kept_outputs: tuple[str, ...]
    unknown: Mapping[str, int]
    equations: tuple[Equation, ...] = ()
    conditions: tuple[Condition, ...] = ()
    rescales: tuple[Rescale, ...] = ()
    attributes: Mapping[Attribute, int] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    obstacles: Mapping[str, str] = field(default_factory=dict)
    renormalised: tuple[str, ...] = ()
    traced: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Polynomial]] = field(default_factory=dict, repr=False)
    program: Any = field(default=None, repr=False, compare=False)
    find_moments: FindMoments | None = field(default=None, repr=False, compare=False)
    forward_fn: str | Callable[..., Any] | None = field(default=None, repr=False, compare=False)
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def all_kept(self) -> Mask:
        """The mask that removes nothing."""
        return np.ones(self.unit_count + 1, dtype=np.bool_)

    @property
    def stacks(self) -> dict[str, tuple[Block, ...]]:
        """The blocks that can be dropped, by the list or sequence that they stand in."""
        found: dict[str, tuple[Block, ...]] = {}
        for block in self.blocks:
            found[block.container] = (*found.get(block.container, ()), block)
        return found

    def group(self, name: str) -> Group:
        """The group of that name; :class:`~prunus.errors.PlanError` if there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise PlanError(
            f"no group is called {name!r}",
            fix="list the names with `prunus inspect`, or `[g.name for g in graph.groups]`",
        )

    def cost(self, name: str, kept: Mask | None = None) -> int:
        """A cost with the given units kept, all by default.

        Parameters
        ----------
        name
            As in ``costs``; ``"macs in layer3.*"`` is what :meth:`part` says of it, and
            ``"activation"`` the most of :attr:`moments`.
        """
        mask = self.all_kept if kept is None else kept
        if name == PEAK:
            return max(self.moments.values(mask).values())
        return self.polynomial(name)(measure_widths(self.width_labels, mask))

    def polynomial(self, name: str) -> Polynomial:
        """A cost, whole or in part, as a polynomial; see :meth:`cost`."""
        if name in self.costs:
            return self.costs[name]
        whole, inside, scope = name.partition(IN)
        if whole in self.costs and inside:
            return self.part(whole, scope)
        raise BudgetError(
            f"the graph knows no cost called {name!r}",
            why=f"it counts {', '.join(sorted(self.costs)) or 'nothing'}",
            fix="bound one of those",
        )

    @cached_property
    def moments(self) -> TimePoints:
        """The moments of the forward at which most tensors may be alive, found when asked for."""
        if self.find_moments is None:
            raise BudgetError(
                "the graph does not know which tensors are alive when",
                why="no forward was traced for it",
                fix="take the graph that prunus.trace returns",
            )
        return self.find_moments(self.width_labels)

    def part(self, name: str, scope: str) -> Polynomial:
        """What of a cost lies in a scope.

        Parameters
        ----------
        scope
            A glob over the paths of modules, of which all that is inside counts along, and over
            the names of tensors.  MACs belong to the module whose forward does the work.

        Raises
        ------
        BudgetError
            If nothing in the model that has this cost is called so.
        """
        owners = self.parts.get(name, {})
        return add_up(owners[one] for one in find_inside(owners, scope, self.aliases, name))

    def positions(self, kept: Mask) -> Iterator[tuple[Axis, NDArray[np.int64]]]:
        """For every axis that loses something: the positions that stay."""
        for axis, label in self.labels.items():
            stay = kept_positions(label, kept)
            if len(stay) < len(label):
                yield axis, stay

    def mask_from_positions(self, keep: Mapping[Axis, NDArray[np.int64]]) -> Mask:
        """The units that a selection of positions keeps: those seen at some kept position."""
        kept = np.zeros(self.unit_count + 1, dtype=np.bool_)
        seen = np.zeros(self.unit_count + 1, dtype=np.bool_)
        for axis, label in self.labels.items():
            seen[label] = True
            stay = keep.get(axis)
            kept[label if stay is None else label[stay]] = True
        kept |= ~seen
        kept[0] = True
        return kept

    @cached_property
    def network(self) -> nx.MultiGraph:
        """Axes as nodes, couplings as edges (attribute ``coupling``), pins as node attributes."""
        network = nx.MultiGraph()
        for tensor, shape in self.shapes.items():
            for dim in range(len(shape)):
                network.add_node(Axis(tensor, dim))
        for coupling in self.couplings:
            network.add_edge(coupling.a, coupling.b, coupling=coupling)
        for axis, pin in self.pins:
            network.add_node(axis)
            network.nodes[axis].setdefault("pins", []).append(pin)
        return network

    def explain(self, a: Axis | str, b: Axis | str) -> tuple[Coupling, ...]:
        """The shortest chain of couplings between two axes; empty if nothing ties them.

        A string may leave out the dim, which is then 0: ``"layer1.0.conv1.weight"``.
        """
        source, target = self.axis(a), self.axis(b)
        try:
            path = nx.shortest_path(self.network, source, target)
        except nx.NetworkXNoPath:
            return ()
        return tuple(
            next(iter(self.network[left][right].values()))["coupling"]
            for left, right in pairwise(path)
        )

    def why_pinned(self, axis: Axis | str) -> tuple[tuple[Axis, Pin], ...]:
        """Every pin that reaches the axis, nearest first; empty if all of it is prunable."""
        start = self.axis(axis)
        label = self.labels.get(start)
        if label is not None and (label > 0).any(axis=1).all():
            return ()
        found: list[tuple[Axis, Pin]] = []
        for node in nx.bfs_tree(self.network, start):
            found += [(node, pin) for pin in self.network.nodes[node].get("pins", [])]
        return tuple(found)

    def dot(self) -> str:
        """The graph in the DOT language: one cluster per group, one edge per coupling."""
        lines = ["graph prunus {", "  node [shape=box, fontname=monospace];"]
        home: dict[Axis, str] = {}
        for index, group in enumerate(self.groups):
            lines.append(f'  subgraph cluster_{index} {{ label="{group.name} × {group.size}";')
            for axis, role in group.axes:
                if home.setdefault(axis, group.name) == group.name:
                    lines.append(f'    "{axis}" [tooltip="{role.value}"];')
            lines.append("  }")
        drawn: set[tuple[str, str, str]] = set()
        for coupling in self.couplings:
            edge = (str(coupling.a), str(coupling.b), coupling.operator)
            if edge not in drawn:
                drawn.add(edge)
                lines.append(f'  "{edge[0]}" -- "{edge[1]}" [label="{edge[2]}"];')
        return "\n".join([*lines, "}"])

    def axis(self, name: Axis | str) -> Axis:
        """The axis of that name, ``"layer1.0.conv1.weight[0]"``; without brackets it is dim 0.

        Tied tensors go by their first name.

        Raises
        ------
        PlanError
            If the model has no such axis.
        """
        wanted = name
        if isinstance(name, str):
            dim = re.search(r"\[(\d+)\]$", name)
            name = Axis(name[: dim.start()], int(dim[1])) if dim else Axis(name, 0)
        axis = Axis(self.aliases.get(name.tensor, name.tensor), name.dim)
        if axis not in self.network:
            raise PlanError(
                f"the model has no axis {wanted}",
                why=f"it has {len(self.shapes)} tensors; an axis is a tensor's name and a dim",
                fix='write it as "layer1.0.conv1.weight[0]"',
            )
        return axis
