"""Elementwise operators, factories, and whatever passes a tensor through."""

from __future__ import annotations

import torch

from prunus.graph.axis import Axis, Label
from prunus.graph.program import Effect, Labels
from prunus.tracer.provenance import expression_of
from prunus.tracer.registry import Call, rule, rule_for_tag


def broadcast(call: Call, ndim: int, shape: torch.Size) -> Labels:
    """Tie the aligned dims of all tensor arguments; a dim of size 1 that is stretched is free."""
    operands = [
        (tensor.shape, call.labels(str(path[0]), *path[1:]))  # type: ignore[arg-type]
        for path, tensor in call.tensors()
    ]
    labels: list[Label | None] = []
    for dim in range(ndim):
        aligned = []
        for sizes, operand in operands:
            own = dim - ndim + len(sizes)
            if own >= 0 and sizes[own] == shape[dim] and shape[dim] > 1:
                aligned.append(operand[own])
        joined = aligned[0] if aligned else None
        for other in aligned[1:]:
            joined = call.unify(joined, other, "combined with a tensor that nothing can prune")
        labels.append(joined)
    return tuple(labels)


@rule_for_tag(torch.Tag.pointwise)
@rule("copy_", "masked_fill.Scalar", "masked_fill_.Scalar", "masked_fill.Tensor",
      "masked_fill_.Tensor", "_to_copy", "lerp.Tensor", "zero_", "fill.Scalar", "fill.Tensor",
      "fill_.Scalar", "fill_.Tensor", "hardswish", "hardswish_", "gelu_", "mish_", "threshold_",
      "abs_", "log_sigmoid_forward", "rrelu_with_noise", "_prelu_kernel", "floor_divide",
      "floor_divide.Scalar", "complex", "polar", "_conj", "dropout", "native_dropout", "bernoulli",
      "bernoulli_.float", "uniform_", "normal_", "exponential_", "bernoulli.p",
      "bernoulli_.Tensor", "normal.Tensor_float", "normal.float_Tensor", "normal.Tensor_Tensor",
      "poisson", "binomial", "_standard_gamma", "log_normal_", "geometric_", "cauchy_", "random_",
      "random_.to", "random_.from")  # fmt: skip
def pointwise(call: Call) -> Effect:
    """Each output position depends on the same position of the inputs."""
    return Effect(tuple(broadcast(call, out.dim(), out.shape) for out in call.outputs))


@rule("alias", "detach", "detach_", "lift_fresh", "lift_fresh_copy")  # fmt: skip
def passes(call: Call) -> Effect:
    """The output has the labels of the input."""
    name = call.target._schema.arguments[0].name
    return Effect((call.labels(name),))


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
      "randint_like")  # fmt: skip
def alike(call: Call) -> Effect:
    """As large as another tensor, with nothing of its content."""
    name = call.inner_name(call.name)
    labels: list[Label | None] = []
    for dim, own in enumerate(call.labels("self")):
        if own is not None:
            copies = call.algebra.copies(len(own), Axis(name, dim))
            joined = call.unify(own, copies)
            own = None if joined is None else copies
        labels.append(own)
    return Effect((tuple(labels),))


FACTORIES = ("zeros", "ones", "full", "empty", "rand", "randn", "normal", "new_zeros", "new_ones",
             "new_full", "new_empty")  # fmt: skip
"""Functions that are given the sizes of what they make."""


@rule("zeros", "ones", "full", "empty.memory_format", "empty_strided", "new_zeros", "new_ones",
      "new_full", "new_empty", "new_empty_strided", "rand", "rand.generator", "randn",
      "randn.generator", "normal.float_float", "scalar_tensor")  # fmt: skip
def elastic(call: Call) -> Effect:
    """A tensor without content of its own takes the labels of whatever it meets.

    A size that the forward's code writes as a number stays what it is.
    """
    name = call.inner_name(call.name)
    out = call.outputs[0]
    given = call.given_to(*FACTORIES)
    written = None if given is None else given.sizes(out.dim())
    labels: list[Label | None] = []
    equations = []
    for dim, size in enumerate(out.shape):
        expression = None if written is None else expression_of(written[dim])
        free = size > 1 and not isinstance(expression, int)
        labels.append(call.algebra.copies(size, Axis(name, dim)) if free else None)
        if free and expression is not None:
            equations.append((expression, size, labels[-1]))
    return Effect((tuple(labels),), equations=tuple(equations))


@rule("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randint",
      "randint.low", "randperm")  # fmt: skip
def constants(call: Call) -> Effect:
    """Content depends on the position: nothing may be removed."""
    return Effect(call.unlabelled())
