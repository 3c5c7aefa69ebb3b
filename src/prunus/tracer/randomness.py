"""Operators that draw random numbers or round to a grid, and outcomes that runs share.

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

from prunus.graph.program import Node, Program
from prunus.tracer.registry import call_bound, tensors_in

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
