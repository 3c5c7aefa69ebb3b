"""PyTorch's weight norm: ``g · v / ‖v‖``, whose magnitude ``g`` can make up for a shorter ``v``.

Where positions of ``v`` go over which its norm is taken, the surgeon multiplies ``g`` by
``‖v that is kept‖ / ‖v‖``, and the kept weights stay what they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm as OlderWeightNorm

from prunus.graph.program import Node, Program
from prunus.tracer.dataflow import Dataflow


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
