"""Which weights read what a plan changes, and in which order they can be repaired."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prunus.calibration.activations import derived_of, operands_of, origins_of
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.program import Node, Program, refs_in


@dataclass(frozen=True)
class Order:
    """Stages from 0 on, by name; a stage needs what the stages before it give, and no other of it.

    Attributes
    ----------
    weights
        Every weight that reads changed values: when it is repaired.  One that is read several
        times is when it first runs.
    norms
        Running means of batch norms that read what repaired weights give: of the stage after the
        last of these.
    """

    weights: Mapping[str, int]
    norms: Mapping[str, int]


def find_order(graph: CouplingGraph, kept: Mask) -> Order:
    """What reads changed values: those on which units go, and what is made of such values.

    ``kept`` says which units stay.
    """
    search = _Search(graph.program, kept)
    for node in graph.program.nodes:
        search.follow(node)
    return Order(search.weights, search.norms)


class _Search:
    """Goes along a program and keeps the stage at which every value that changes is there."""

    def __init__(self, program: Program, kept: Mask) -> None:
        self._program, self._kept = program, kept
        self._origins, self._derived = origins_of(program), derived_of(program)
        self._roots: dict[int, int] = {}  # a view changes with what it is a view of
        self._ready: dict[int, int] = {}
        self.weights: dict[str, int] = {}
        self.norms: dict[str, int] = {}

    def follow(self, node: Node) -> None:
        """What one operator reads, and gives."""
        values = [ref.value for ref in refs_in(node.args)]
        returns = node.target._schema.returns
        if values and returns and returns[0].alias_info is not None:
            root = self._roots.get(values[0], values[0])
            self._roots.update(dict.fromkeys(node.outputs, root))
        stage = max(map(self._stage, values), default=-1)
        if stage < 0:
            return
        for ref in refs_in(node.args.get("running_mean")) if stage else ():
            name = self._origins.get(ref.value, "")
            self.norms[name] = max(stage, self.norms.get(name, 0))
        weight = self._weight_of(node)
        if weight:
            self.weights.setdefault(weight, stage)
            stage += 1
        for value in node.outputs:
            root = self._roots.get(value, value)
            self._ready[root] = max(stage, self._ready.get(root, -1))

    def _stage(self, value: int) -> int:
        """When a value is there; −1 where nothing of it changes."""
        ready = self._ready.get(self._roots.get(value, value), -1)
        return max(ready, 0) if self._loses(value) else ready

    def _loses(self, value: int) -> bool:
        if value in self._derived:  # a weight that loses rows gives the others as before
            return False
        labels = (self._program.label(label) for label in self._program.labels[value])
        return any(label is not None and not self._kept[label].all() for label in labels)

    def _weight_of(self, node: Node) -> str:
        """The named weight by which values are multiplied; or nothing."""
        operands = operands_of(node)
        if operands is None:
            return ""
        values = [node.args[name].value for name, _ in operands]
        fixed = [value in self._derived for value in values]
        return self._origins.get(values[fixed.index(True)], "") if fixed[0] != fixed[1] else ""
