"""The coupling graph of the model that a cut leaves, from that of the original, without a trace.

Labels lose the positions that the cut removed, and groups and constraints the units; units keep
their ids.  So costs are the polynomials of the original at the widths that are left, and a mask of
the smaller graph is one of the original once both are combined.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Axis, Label, Mask, kept_positions
from prunus.graph.coupling import Coupling, CouplingGraph
from prunus.graph.expressions import Expression, Operation, Width, solve
from prunus.graph.groups import (
    Aligned,
    AtLeast,
    Constraint,
    Lockstep,
    Preferred,
    Proportional,
    Rescale,
)
from prunus.graph.polynomial import TimePoints
from prunus.graph.program import Node, Program

Positions = NDArray[np.int64]


def graph_after(graph: CouplingGraph, kept: Mask) -> CouplingGraph:
    """What a trace of the model cut to the kept units would find, units under their old ids.

    Parameters
    ----------
    kept
        Shape ``(unit_count + 1,)``, of a choice that meets every constraint.  Units that no kept
        position is left of count as removed (:meth:`CouplingGraph.mask_from_positions`).
    """
    cut = _Cut(graph, graph.mask_from_positions(dict(graph.positions(kept))))
    return replace(
        graph,
        shapes={name: cut.shape(name, shape) for name, shape in graph.shapes.items()},
        labels={axis: cut.label(label) for axis, label in graph.labels.items()},
        groups=tuple(replace(g, units=cut.units(g.units)) for g in graph.groups),
        constraints=tuple(map(cut.constraint, graph.constraints)),
        width_labels=tuple(map(cut.label, graph.width_labels)),
        couplings=tuple(map(cut.coupling, graph.couplings)),
        equations=tuple(
            replace(e, expression=cut.expression(e.expression), width=cut.width(e.width))
            for e in graph.equations
        ),
        conditions=tuple(
            replace(c, left=cut.expression(c.left), right=cut.expression(c.right))
            for c in graph.conditions
        ),
        attributes=dict(solve(graph.equations, graph.attributes, kept).values),
        rescales=tuple(map(cut.rescale, graph.rescales)),
        program=None if graph.program is None else cut.program(graph.program),
        find_moments=None if graph.find_moments is None else cut.moments,
    )


class _Cut:
    """What is left of every part of a graph."""

    def __init__(self, graph: CouplingGraph, kept: Mask) -> None:
        self._graph, self._kept = graph, kept
        self._labels: dict[int, tuple[Label, Label]] = {}

    def positions(self, label: Label) -> Positions:
        return kept_positions(label, self._kept)

    def label(self, label: Label) -> Label:
        """One object for one object, since widths are cached by identity."""
        if id(label) not in self._labels:
            self._labels[id(label)] = label, label[self.positions(label)]
        return self._labels[id(label)][1]

    def shape(self, name: str, shape: Iterable[int]) -> tuple[int, ...]:
        first = self._graph.aliases.get(name, name)
        own = (self._graph.labels.get(Axis(first, dim)) for dim in range(len(tuple(shape))))
        return tuple(
            size if label is None else len(self.label(label))
            for size, label in zip(shape, own, strict=True)
        )

    def units(self, units: Positions) -> Positions:
        return units[self._kept[units]]

    def moved(self, axis: Axis, positions: Iterable[int]) -> Positions:
        """Those of the positions on an axis that are kept, as they are counted after the cut."""
        found = np.asarray(tuple(positions), dtype=np.int64)
        label = self._graph.labels.get(axis)
        if label is None:
            return found
        stay = self.positions(label)
        return np.searchsorted(stay, found[np.isin(found, stay)])

    def coupling(self, coupling: Coupling) -> Coupling:
        """Both ends of a coupled pair are kept, or neither."""
        return replace(
            coupling,
            left=self.moved(coupling.a, coupling.left),
            right=self.moved(coupling.b, coupling.right),
        )

    def constraint(self, constraint: Constraint) -> Constraint:
        if isinstance(constraint, Lockstep):
            sets = [self.units(units) for units in constraint.sets]
            there = [index for index, units in enumerate(sets) if len(units)]
            rates = tuple(constraint.rates[i] for i in there) if constraint.rates else ()
            return replace(constraint, sets=tuple(sets[i] for i in there), rates=rates)
        if isinstance(constraint, (AtLeast, Aligned)):
            return replace(constraint, label=self.label(constraint.label))
        if isinstance(constraint, Preferred):
            return constraint
        width, divisor = map(self.proportional, (constraint.width, constraint.divisor))
        return replace(constraint, width=width, divisor=divisor)

    def proportional(self, number: Proportional) -> Proportional:
        sets = tuple(self.units(units) for units in number.sets)
        size = number.of([np.asarray(len(units)) for units in sets])
        return replace(number, size=int(size), sets=sets)

    def width(self, width: Width) -> Width:
        if width.label is None:
            return width
        label = self.label(width.label)
        return Width(len(label), label)

    def expression(self, expression: Expression) -> Expression:
        if isinstance(expression, Operation):
            left, right = self.expression(expression.left), self.expression(expression.right)
            return replace(expression, left=left, right=right)
        return self.width(expression) if isinstance(expression, Width) else expression

    def rescale(self, rescale: Rescale) -> Rescale:
        targets = tuple(
            (tensor, dim, tuple(self.moved(Axis(tensor, dim), positions).tolist()))
            for tensor, dim, positions in rescale.targets
        )
        return Rescale(self.label(rescale.label), targets)

    def moments(self, labels: tuple[Label, ...]) -> TimePoints:
        """Those of the original, at the widths that are left."""
        found = self._graph.moments
        return TimePoints(tuple(map(self.label, found.labels)), found.bytes)

    def program(self, program: Program) -> Program:
        """The same operators on values of the sizes that are left.

        Their arguments are those of the original but for the groups of convolutions, so that it
        says who reads what, and can't be run again.
        """
        stay: dict[int, tuple[Label, Label]] = {}

        def atoms(label: Label | None) -> Label | None:
            units = program.label(label)
            if label is None or units is None:
                return label
            if id(label) not in stay:
                stay[id(label)] = label, label[self.positions(units)]
            return stay[id(label)][1]

        labels = tuple(tuple(map(atoms, dims)) for dims in program.labels)
        shapes = tuple(
            tuple(
                size if label is None else len(label)
                for size, label in zip(shape, dims, strict=True)
            )
            for shape, dims in zip(program.shapes, labels, strict=True)
        )
        nodes = tuple(_with_groups(node, shapes) for node in program.nodes)
        return replace(program, nodes=nodes, labels=labels, shapes=shapes)


def _with_groups(node: Node, shapes: tuple[tuple[int, ...], ...]) -> Node:
    """A grouped convolution with as many groups as are left; other operators as they are.

    A weight is (outputs, inputs of a group, …), and (inputs, outputs of a group, …) if transposed.
    """
    args: Any = node.args
    if args.get("groups", 1) == 1:
        return node
    data = node.outputs[0] if args["transposed"] else args["input"].value
    groups = shapes[data][1] // shapes[args["weight"].value][1]
    return replace(node, args={**args, "groups": groups})
