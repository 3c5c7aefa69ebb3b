"""Sums over a shared dim: matrix products and convolutions."""

from __future__ import annotations

from math import prod

from torch import Tensor

from prunus.graph.axis import Label
from prunus.tracer.provenance import expression_of
from prunus.tracer.registry import Call, Effect, Equations, Labels, Place, rule

CONTRACTED = "contracted with a tensor that nothing can prune"


def matrix_product(call: Call, a: str, b: str, bias: str | None = None) -> Effect:
    """``a (…, i, k) @ b (…, k, j)``, leading batch dims elementwise, bias broadcast."""
    left, right = call.labels(a), call.labels(b)
    first, second = call.args[a], call.args[b]
    rows = () if first.dim() == 1 else (left[-2],)
    cols = () if second.dim() == 1 else (right[-1],)
    inner = call.unify(left[-1], right[0] if second.dim() == 1 else right[-2], CONTRACTED)
    batch = tuple(call.unify(one, other) for one, other in zip(left[:-2], right[:-2], strict=False))
    labels: Labels = (*batch, *rows, *cols)
    if bias is not None:
        labels = add_bias(call, labels, call.outputs[0], bias)
    left_dim, right_dim = first.dim() - 1, max(second.dim() - 2, 0)
    return Effect(
        (labels,),
        contracted=(((a,), left_dim), ((b,), right_dim)),
        produced=_produced(((a,), left_dim - 1), ((b,), second.dim() - 1), first, second),
        spans=((*zip(call.outputs[0].shape, labels, strict=True), (first.shape[-1], inner)),),
    )


def _produced(a: Place, b: Place, first: Tensor, second: Tensor) -> tuple[Place, ...]:
    return (*((a,) if first.dim() > 1 else ()), *((b,) if second.dim() > 1 else ()))


def add_bias(call: Call, labels: Labels, out: Tensor, bias: str) -> Labels:
    """Tie a broadcast addend to the output's dims."""
    addend = call.args[bias]
    if addend is None:
        return labels
    own = call.labels(bias)
    joined = list(labels)
    for dim in range(1, addend.dim() + 1):
        if addend.shape[-dim] == out.shape[-dim] and out.shape[-dim] > 1:
            joined[-dim] = call.unify(joined[-dim], own[-dim], "added to a fixed tensor")
    return tuple(joined)


@rule("mm", "bmm", "mv", "dot", "vdot")
def product(call: Call) -> Effect:
    """Plain matrix products."""
    first, second = (argument.name for argument in call.target._schema.arguments[:2])
    return matrix_product(call, first, second)


@rule("addmm", "addmv", "baddbmm", "baddbmm_", "addbmm")
def product_and_sum(call: Call) -> Effect:
    """Matrix products added to another tensor."""
    addend, first, second = (argument.name for argument in call.target._schema.arguments[:3])
    if call.name == "addbmm":
        call.pin_all("addbmm sums over its batch")
        return Effect(call.unlabelled())
    return matrix_product(call, first, second, addend)


@rule("_grouped_mm")
def product_by_expert(call: Call) -> Effect:
    """Tokens (t, k), sorted by expert, times the weight (e, k, n) of the expert of each.

    Kernels take rows of multiples of 16 bytes, so of other multiples in another type.
    """
    tokens, weights = call.labels("self"), call.labels("mat2")
    if len(tokens) != 2 or len(weights) != 3:
        call.pin_all("a grouped product of another kind than tokens by experts")
        return Effect(call.unlabelled())
    for label in (tokens[0], weights[0], *(call.labels("offs") or ())):
        call.pin(label, "tokens are counted off by expert")
    inner = call.unify(tokens[1], weights[1], CONTRACTED)
    labels: Labels = (None, weights[2])
    if call.args.get("bias") is not None:
        bias = call.labels("bias")
        call.pin(bias[0], "tokens are counted off by expert")
        labels = (None, call.unify(weights[2], bias[-1]))
    first, second = call.args["self"], call.args["mat2"]
    multiple = max(16 // first.element_size(), 1)
    return Effect(
        (labels,),
        contracted=((("self",), 1), (("mat2",), 1)),
        produced=((("mat2",), 2),),
        spans=(((first.shape[0], None), (first.shape[1], inner), (second.shape[2], labels[1])),),
        aligned=((inner, multiple), (labels[1], multiple)),
    )


@rule("convolution", "_convolution")
def convolution(call: Call) -> Effect:
    """Convolutions of any rank: dense, grouped, depthwise, transposed."""
    weight, groups = call.labels("weight"), call.args["groups"]
    image = call.labels("input")
    for label in (*image[2:], *weight[2:]):
        call.pin(label, "a convolution needs every position of its window")
    equations = _stated_groups(call, image[1])
    if call.args["transposed"]:
        out, contracted, produced = _transposed(call, image[1], weight, groups)
    else:
        out, contracted, produced = _direct(call, image[1], weight, groups)
    bias = call.args["bias"]
    if bias is not None:
        out = call.unify(out, call.labels("bias")[0])
    result = call.outputs[0]
    labels: Labels = (image[0], out, *(None,) * (result.dim() - 2))
    return Effect(
        (labels,),
        contracted=contracted,
        produced=produced,
        spans=(_macs(call, labels),),
        equations=equations,
    )


GROUPS_AT = {"conv1d": 6, "conv2d": 6, "conv3d": 6, "conv_transpose1d": 6,
             "conv_transpose2d": 6, "conv_transpose3d": 6}  # fmt: skip
"""Functions around a convolution, with the position at which they take the number of groups."""


def _stated_groups(call: Call, channels: Label | None) -> Equations:
    """The number of groups as the forward wrote it: that of the blocks of channels."""
    groups = call.args["groups"]
    if groups == 1 or channels is None or call.given is None or call.given.name not in GROUPS_AT:
        return ()
    written = expression_of(call.given.argument(GROUPS_AT[call.given.name], "groups"))
    if written is None:
        return ()
    why = call.why("a grouped convolution keeps its blocks equal")
    block, _ = call.algebra.split(channels, (groups, len(channels) // groups), why)
    return () if block is None else ((written, groups, block),)


Convolved = tuple[Label | None, tuple[Place, ...], tuple[Place, ...]]
"""Label of the channels that come out; contracted and produced places."""


def _direct(call: Call, channels: Label | None, weight: Labels, groups: int) -> Convolved:
    outs, ins = call.args["weight"].shape[:2]
    depthwise = ins == 1 and groups == outs
    produced: tuple[Place, ...] = () if depthwise else ((("weight",), 0),)
    if groups == 1:
        call.unify(channels, weight[1], CONTRACTED)
        return weight[0], ((("input",), 1), (("weight",), 1)), produced
    algebra, why = call.algebra, call.why("a grouped convolution keeps its blocks equal")
    block, column = algebra.split(channels, (groups, ins), why)
    out_block, _ = algebra.split(weight[0], (groups, outs // groups), why)
    call.unify(block, out_block, CONTRACTED)
    call.unify(column, weight[1], CONTRACTED)
    contracted: tuple[Place, ...] = ((("input",), 1), (("weight",), 1)) if ins > 1 else ()
    return algebra.canonical(weight[0]), contracted, produced


def _transposed(call: Call, channels: Label | None, weight: Labels, groups: int) -> Convolved:
    ins, outs = call.args["weight"].shape[:2]
    mixes = ins > groups
    contracted: tuple[Place, ...] = ((("input",), 1), (("weight",), 0)) if mixes else ()
    produced: tuple[Place, ...] = ((("weight",), 1),) if mixes else ()
    algebra, why = call.algebra, call.why("a grouped convolution keeps its blocks equal")
    call.unify(channels, weight[0], CONTRACTED)
    if groups == 1:
        return weight[1], contracted, produced
    block, _ = algebra.split(channels, (groups, ins // groups), why)
    return algebra.merge((block, weight[1]), (groups, outs)), contracted, produced


def _macs(call: Call, out: Labels) -> tuple[tuple[int, Label | None], ...]:
    """Batch × out channels × in channels per group × kernel × the positions it is applied to."""
    weight = call.args["weight"]
    kernel = prod(weight.shape[2:])
    if call.args["transposed"]:
        applied = prod(call.args["input"].shape[2:])
        batch = (call.args["input"].shape[0], out[0])
        return (
            batch,
            (weight.shape[0], call.labels("weight")[0]),
            (weight.shape[1], call.labels("weight")[1]),
            (kernel * applied, None),
        )
    result = call.outputs[0]
    return (
        (result.shape[0], out[0]),
        (weight.shape[0], out[1]),
        (weight.shape[1], call.labels("weight")[1]),
        (kernel * prod(result.shape[2:]), None),
    )
