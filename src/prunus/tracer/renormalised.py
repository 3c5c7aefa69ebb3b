"""Weights that a forward computes from weights, so that kept entries change when others go.

Spectral norm, weight standardisation, a softmax or a norm over weights: such operators see the kept
positions only, like any norm.  Here it is found where they do, and the same program is made with
these weights as they were: plain silencing, which zeroes what reads a removed unit and no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from prunus.graph.effect import Place
from prunus.graph.groups import Group
from prunus.graph.program import Node, Program, refs_in

PRODUCTS = frozenset(("mm", "addmm", "mv", "addmv", "convolution", "_convolution", "_trilinear"))
"""Operators that take a weight as an operand; products in batches are those of attention."""


@dataclass(frozen=True)
class Renormalised:
    """The units whose removal changes kept weights, and the program in which it does not."""

    units: NDArray[np.int64]
    plain: Program


def find_renormalised(program: Program) -> Renormalised | None:
    """What a program computes from weights that go by what is kept; None if nothing does."""
    weights = _Weights(program)
    places: dict[int, set[Place]] = {}
    units: set[int] = set()
    for value in weights.read():
        own = set(weights.units(value).tolist())
        for index in weights.behind(value):
            for place in weights.seen(index):
                met = own & set(weights.units_at(index, place).tolist())
                if met:
                    units |= met
                    places.setdefault(index, set()).add(place)
    if not units:
        return None
    nodes = list(program.nodes)
    for index, found in places.items():
        nodes[index] = _without(nodes[index], found)
    return Renormalised(np.array(sorted(units)), replace(program, nodes=tuple(nodes)))


def names_of(found: Renormalised | None, groups: Iterable[Group]) -> tuple[str, ...]:
    """Names of the groups that have such units."""
    if found is None:
        return ()
    return tuple(group.name for group in groups if np.isin(group.units, found.units).any())


def _without(node: Node, places: set[Place]) -> Node:
    """The operator on all positions of these dims."""
    effect = node.effect
    if effect is None:
        return node
    mixing, contracted = (
        tuple(place for place in own if place not in places)
        for own in (effect.mixing, effect.contracted)
    )
    return replace(node, effect=replace(effect, mixing=mixing, contracted=contracted))


class _Weights:
    """What of a program is made of state alone, and what reads it."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._maker = {out: n for n, node in enumerate(program.nodes) for out in node.outputs}
        made = set(program.state) | set(program.constants)
        for node in program.nodes:
            if _draws_nothing(node) and all(ref.value in made for ref in refs_in(node.args)):
                made.update(node.outputs)
        self._made = made

    def read(self) -> Iterator[int]:
        """Computed values that data meets as a weight: in a product, or as one vector of factors.

        An entry-wise operand counts where a single tensor is behind it, as in ``softmax(gates)``:
        others are data in their own right, such as learned queries.
        """
        found: dict[int, None] = {}
        for node in self._program.nodes:
            references = [ref.value for ref in refs_in(node.args)]
            if all(value in self._made for value in references):
                continue
            product = _name(node) in PRODUCTS
            pointwise = torch.Tag.pointwise in node.target.tags
            for value in references:
                if value in self._made and value in self._maker:
                    alone = pointwise and len(self._state(value)) == 1
                    if product or alone:
                        found[value] = None
        return iter(found)

    def behind(self, value: int) -> list[int]:
        """Positions of the operators that a value is computed by, of state alone."""
        pending, seen = [value], set[int]()
        while pending:
            index = self._maker.get(pending.pop())
            if index is not None and index not in seen:
                seen.add(index)
                pending += [ref.value for ref in refs_in(self._program.nodes[index].args)]
        return sorted(seen)

    def seen(self, index: int) -> tuple[Place, ...]:
        """Dims over which an operator's positions see one another."""
        effect = self._program.nodes[index].effect
        return () if effect is None else (*effect.mixing, *effect.contracted)

    def units(self, value: int) -> NDArray[np.int64]:
        """The units on all dims of a value."""
        labels = [self._program.label(label) for label in self._program.labels[value]]
        found = [label.ravel() for label in labels if label is not None]
        whole = np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)
        return whole[whole > 0]

    def units_at(self, index: int, place: Place) -> NDArray[np.int64]:
        """The units on one dim of an argument."""
        (name, *rest), dim = place
        reference = self._program.nodes[index].args[str(name)]
        for key in rest:
            reference = reference[key]
        label = self._program.value_label(reference, dim)
        return np.zeros(0, dtype=np.int64) if label is None else np.unique(label)

    def _state(self, value: int) -> set[int]:
        inside = {
            ref.value
            for index in self.behind(value)
            for ref in refs_in(self._program.nodes[index].args)
        }
        return inside & set(self._program.state)


def _name(node: Node) -> str:
    return str(node.target._schema.name).partition("::")[2]


def _draws_nothing(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded not in node.target.tags
