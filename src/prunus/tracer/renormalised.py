"""Weights that a forward computes from weights, so that kept entries change when others are cut.

Spectral norm, weight standardisation, a softmax or a norm over weights: such operators see the kept
positions only, like any norm.  Here it is found where they do, and the same program is made with
these weights as they were: plain silencing, which zeroes what reads a removed unit and no more.

PyTorch's weight norm ``g · v / ‖v‖`` is apart: where positions of ``v`` are cut over which its norm
is taken, the surgeon multiplies ``g`` by ``‖v that is kept‖ / ‖v‖``, and kept weights stay as is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm as OlderWeightNorm

from prunus.graph.groups import Group
from prunus.graph.program import Node, Place, Program
from prunus.tracer.dataflow import Dataflow, name_of, operand

PRODUCTS = frozenset(("mm", "addmm", "mv", "addmv", "convolution", "_convolution", "_trilinear"))
"""Operators that take a weight as an operand; products in batches are those of attention."""


@dataclass(frozen=True)
class Renormalised:
    """The units whose removal changes kept weights, and the program in which it does not."""

    units: NDArray[np.int64]
    plain: Program


def find_renormalised(flow: Dataflow) -> Renormalised | None:
    """What a program computes from weights that go by what is kept; None if nothing does."""
    weights = _Weights(flow)
    places: dict[Node, set[Place]] = {}
    units: set[int] = set()
    for value in weights.read():
        own = set(weights.units(value).tolist())
        for node in weights.behind(value):
            for place in _seen(node):
                met = own & set(weights.units_at(node, place).tolist())
                if met:
                    units |= met
                    places.setdefault(node, set()).add(place)
    if not units:
        return None
    nodes = tuple(
        _without(node, places[node]) if node in places else node for node in flow.program.nodes
    )
    return Renormalised(np.array(sorted(units)), replace(flow.program, nodes=nodes))


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

    def __init__(self, flow: Dataflow) -> None:
        self._flow, self._program = flow, flow.program
        made = {*self._program.state, *self._program.constants}
        for node in self._program.nodes:
            if made.issuperset(flow.reads[node]) and _draws_nothing(node):
                made.update(node.outputs)
        self._computed = made & flow.maker.keys()
        self._made = made

    def read(self) -> Iterator[int]:
        """Computed values that data meets as a weight: in a product, or as one vector of factors.

        An entry-wise operand counts where a single tensor is behind it, as in ``softmax(gates)``:
        others are data in their own right, such as learned queries.
        """
        found: dict[int, None] = {}
        for node, read in self._flow.reads.items():
            computed = self._computed.intersection(read)
            if computed and not self._made.issuperset(read):
                product = name_of(node) in PRODUCTS
                pointwise = torch.Tag.pointwise in node.target.tags
                for value in filter(computed.__contains__, read):
                    if product or (pointwise and self._is_of_one(value)):
                        found[value] = None
        return iter(found)

    def _is_of_one(self, value: int) -> bool:
        """Whether a single tensor of state is behind a value."""
        return len(list(self._flow.state_behind(value))) == 1

    def behind(self, value: int) -> list[Node]:
        """The operators that a value is computed by, of state alone."""
        pending, seen = [value], set[Node]()
        while pending:
            node = self._flow.maker.get(pending.pop())
            if node is not None and node not in seen:
                seen.add(node)
                pending += self._flow.reads[node]
        return sorted(seen, key=self._flow.place.__getitem__)

    def units(self, value: int) -> NDArray[np.int64]:
        """The units on all dims of a value."""
        labels = [self._program.label(label) for label in self._program.labels[value]]
        found = [label.ravel() for label in labels if label is not None]
        whole = np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)
        return whole[whole > 0]

    def units_at(self, node: Node, place: Place) -> NDArray[np.int64]:
        """The units on one dim of an argument."""
        path, dim = place
        label = self._program.value_label(operand(node, path), dim)
        return np.zeros(0, dtype=np.int64) if label is None else np.unique(label)


def _seen(node: Node) -> tuple[Place, ...]:
    """Dims over which an operator's positions see one another."""
    return () if node.effect is None else (*node.effect.mixing, *node.effect.contracted)


def _draws_nothing(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded not in node.target.tags


@dataclass(frozen=True)
class WeightNorm:
    """Names of the two tensors, and the dim along which every position has its own norm.

    The dim −1 stands for one norm of all.
    """

    magnitude: str
    direction: str
    dim: int


def find_weight_norms(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[WeightNorm]:
    """Every weight norm of a model, by the names in its state; the older kind as well."""
    names = {id(tensor): name for name, tensor in state.items()}

    def named(magnitude: Any, direction: Any, dim: int | None) -> Iterator[WeightNorm]:
        if id(magnitude) in names and id(direction) in names:
            known = names[id(magnitude)], names[id(direction)]
            yield WeightNorm(*known, -1 if dim is None else dim)

    for module in model.modules():
        if isinstance(module, ParametrizationList) and len(module):
            norm = module[0]
            if type(norm) is _WeightNorm:
                yield from named(module.original0, module.original1, norm.dim)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, OlderWeightNorm):
                older = module._parameters
                pair = older.get(f"{hook.name}_g"), older.get(f"{hook.name}_v")
                yield from named(*pair, hook.dim)


def keep_normed_weights(
    program: Program, from_state: Sequence[bool], model: nn.Module, state: Mapping[str, Tensor]
) -> Program:
    """The program with operators of weight norms that see all positions.

    The magnitude makes up for those that are cut.
    """
    norms = [{one.magnitude, one.direction} for one in find_weight_norms(model, state)]
    if not norms:
        return program
    flow = Dataflow(program)

    def whole(node: Node) -> Node:
        if node.effect is None or not all(from_state[value] for value in node.outputs):
            return node
        behind = {program.state[n] for value in node.outputs for n in flow.state_behind(value)}
        if not any(behind <= norm for norm in norms):
            return node
        return replace(node, effect=replace(node.effect, mixing=(), contracted=()))

    return replace(program, nodes=tuple(map(whole, program.nodes)))


def norms_of(direction: Tensor, dim: int) -> Tensor:
    """The norms by which a direction is divided, in its own number of dims, in float64."""
    return torch.norm_except_dim(direction.detach().double(), 2, dim)
