"""Run one recorded operator again: on the kept positions alone, or from a seed of its own.

Norms, softmax and reductions let every position see the others: what "the original with units
silenced" means for them is that they run on the positions that are kept.

Fewer units draw fewer numbers, so the streams of a model and of its pruned copy differ.  They are
comparable once the draws are tied: the n-th random operator of every run at full size starts from
the same seed, and the pruned copy gets the kept positions of what it drew there.

Fake quantization is tied likewise: the last bit of a sum decides to which side a number is rounded,
and one step of the grid is much more than an error that counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.cuda._utils import _get_device_index
from torch.utils._pytree import tree_flatten, tree_unflatten

from prunus.graph.axis import Label, Mask, kept_positions
from prunus.graph.program import Node, Program
from prunus.tracer.registry import call_bound, tensors_in


def run_on_kept(node: Node, bound: Mapping[str, Any], program: Program, kept: Mask) -> Any:
    """The result of a mixing operator on the kept positions, at full size; None if it mixes none.

    Removed positions of the outputs are zero.
    """
    if node.effect is None:
        return None
    arguments = _kept_arguments(node, bound, program, kept)
    if all(arguments[name] is bound[name] for name in bound):
        return None
    for name, value in node.effect.sizes.items():
        arguments[name] = resize(value, program, kept)
    result = call_bound(node.target, arguments)
    leaves, spec = tree_flatten(result)
    for output, label in node.effect.counted:
        leaves[output] = _numbered(leaves[output], program.label(label), kept)
    at = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for place, number, layout in zip(at, node.outputs, _layouts(node, bound), strict=False):
        whole = _spread(leaves[place], program.labels[number], program, kept)
        leaves[place] = lay(whole, layout)
    return tree_unflatten(leaves, spec)


def _kept_arguments(
    node: Node, bound: Mapping[str, Any], program: Program, kept: Mask
) -> dict[str, Any]:
    """The arguments of a mixing operator without removed positions."""
    arguments = dict(bound)
    for (name, *rest), dim in node.effect.mixing if node.effect is not None else ():
        assert not rest, f"{node.target}: a mixing dim inside a list is not supported"
        label = program.value_label(node.args[str(name)], dim)
        if label is not None:
            arguments[str(name)] = _select(arguments[str(name)], dim, kept_positions(label, kept))
    return arguments


def _numbered(places: Tensor, label: Label | None, kept: Mask) -> Tensor:
    """Positions among the kept ones as positions among all."""
    if label is None:
        return places
    return torch.as_tensor(kept_positions(label, kept), device=places.device)[places]


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


FREE = frozenset(
    (
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"),
        *("uniform_", "normal_", "exponential_", "random_", "geometric_", "cauchy_", "log_normal_"),
        "normal.float_float",
        "bernoulli_.float",
    )
)
"""Operators whose draws don't depend on the content of any tensor."""

ROUNDED = frozenset(
    (
        "_fused_moving_avg_obs_fq_helper",
        "fake_quantize_per_tensor_affine_cachemask",
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
        "fake_quantize_per_channel_affine_cachemask",
    )
)
"""Operators that round to a grid."""

DRAWS = "the forward draws random numbers"


def is_random(target: OpOverload, bound: Mapping[str, Any]) -> bool:
    """Whether a call draws random numbers; dropout with probability 0 or outside training not."""
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    if "dropout_p" in bound:
        return bool(bound["dropout_p"])
    return all(bound.get(name) is not False for name in ("train", "training"))


def is_free(target: OpOverload) -> bool:
    """Whether the draws have nothing to do with what the tensors hold that go in."""
    name = str(target._schema.name).partition("::")[2]
    return name in FREE or f"{name}.{target._overloadname}" in FREE


def is_tied(target: OpOverload, bound: Mapping[str, Any]) -> bool:
    """Whether the outcome of a call is handed from one run to another."""
    return is_random(target, bound) or str(target._schema.name).partition("::")[2] in ROUNDED


def tied_nodes(program: Program) -> list[Node]:
    """The operators of a program whose outcomes runs share, in order."""
    return [node for node in program.nodes if is_tied(node.target, node.args)]


def draw(target: OpOverload, bound: Mapping[str, Any], order: int) -> Any:
    """Run an operator from a seed of its own, whatever generator the forward gave it."""
    if "generator" in bound:
        bound = {**bound, "generator": None}
    devices = [tensor.device for _, tensor in tensors_in(bound)]
    with _seeded(order, torch.device(devices[0] if devices else bound.get("device") or "cpu")):
        return call_bound(target, bound)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """PyTorch's own generator of a device from a seed on; it is put back afterwards."""
    generator: Any = torch.default_generator
    if device.type == "cuda":
        torch.cuda.init()
        generator = torch.cuda.default_generators[_get_device_index(device, optional=True)]
    state = generator.get_state()
    try:
        generator.manual_seed(seed)
        yield
    finally:
        generator.set_state(state)


def say_draws(program: Program) -> str:
    """That, and where, a program draws random numbers; empty if it does not."""
    node = next((node for node in program.nodes if is_random(node.target, node.args)), None)
    if node is None:
        return ""
    return f"{DRAWS}: {node.target} in {node.module or 'the model'} ({node.source})"


def copy_of(values: Any) -> list[Tensor]:
    """The tensors among the arguments of a call as they are now, in order."""
    return [tensor.clone() for _, tensor in tensors_in(values)]
