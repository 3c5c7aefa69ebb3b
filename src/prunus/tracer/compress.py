"""Run one recorded operator on the kept positions alone.

Norms, softmax and reductions let every position see the others: what "the original with units
silenced" means for them is that they run on the positions that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from prunus.graph.axis import Label, Mask, kept_positions
from prunus.graph.program import Node, Program
from prunus.tracer.registry import call_bound


def run_on_kept(node: Node, bound: Mapping[str, Any], program: Program, kept: Mask) -> Any:
    """The result of a mixing operator on the kept positions, at full size; None if it mixes none.

    Removed positions of the outputs are zero.
    """
    if node.effect is None:
        return None
    arguments = dict(bound)
    for (name, *rest), dim in node.effect.mixing:
        if rest:
            raise AssertionError(f"{node.target}: a mixing dim inside a list is not supported")
        label = program.value_label(node.args[str(name)], dim)
        if label is not None:
            arguments[str(name)] = _select(arguments[str(name)], dim, kept_positions(label, kept))
    if all(arguments[name] is bound[name] for name in bound):
        return None
    for name, value in node.effect.sizes.items():
        arguments[name] = resize(value, program, kept)
    result = call_bound(node.target, arguments)
    leaves, spec = tree_flatten(result)
    numbers = iter(node.outputs)
    layouts = iter(_layouts(node, bound))
    spread = [
        lay(_spread(leaf, program.labels[next(numbers)], program, kept), next(layouts))
        if isinstance(leaf, Tensor)
        else leaf
        for leaf in leaves
    ]
    return tree_unflatten(spread, spec)


def _select(tensor: Tensor, dim: int, positions: Label) -> Tensor:
    if len(positions) == tensor.shape[dim]:
        return tensor
    return tensor.index_select(dim, torch.as_tensor(positions, device=tensor.device))


def resize(value: Any, program: Program, kept: Mask) -> Any:
    """Integer arguments as they are for the kept positions: (size, label) becomes the count."""
    if isinstance(value, list):
        return [resize(item, program, kept) for item in value]
    size, label = value
    units = program.label(label)
    return size if units is None else len(kept_positions(units, kept))


def _layouts(node: Node, bound: Mapping[str, Any]) -> list[tuple[int, ...] | None]:
    """Strides of the operator's own results, which decide on kernels that follow.

    It has to run for that, unless all that goes in is contiguous: then norms, softmax and
    reductions answer contiguously.
    """
    tensors = [value for value in bound.values() if isinstance(value, Tensor)]
    if node.target._schema.is_mutable or all(tensor.is_contiguous() for tensor in tensors):
        return [None] * len(node.outputs)
    whole = tree_flatten(call_bound(node.target, bound))[0]
    return [leaf.stride() for leaf in whole if isinstance(leaf, Tensor)]


def lay(tensor: Tensor, strides: tuple[int, ...] | None) -> Tensor:
    """The same content with the given strides, where these fill their memory without gaps."""
    if not strides or tensor.stride() == strides or not _fills(tensor.shape, strides):
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def _fills(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether every element has a place of its own, and none is left between them."""
    expected = 1
    for stride, size in sorted(
        (n, size) for n, size in zip(strides, shape, strict=True) if size > 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def _spread(
    small: Tensor, labels: tuple[Label | None, ...], program: Program, kept: Mask
) -> Tensor:
    """Back to full size along every dim that was cut; zeros where nothing stayed."""
    for dim, label in enumerate(labels):
        units = program.label(label)
        if units is None or small.shape[dim] == len(units):
            continue
        stay = torch.as_tensor(kept_positions(units, kept), device=small.device)
        shape = list(small.shape)
        shape[dim] = len(units)
        small = small.new_zeros(shape).index_copy_(dim, stay, small)
    return small
