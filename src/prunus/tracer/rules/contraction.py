"""Sums over a shared dim: matrix products and convolutions."""

from __future__ import annotations

from itertools import chain
from math import prod

from torch import Tensor

from prunus.graph.axis import Label
from prunus.graph.program import Effect, Equations, Labels, Place
from prunus.tracer.provenance import expression_of
from prunus.tracer.registry import Call, rule

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


@rule("addmm", "addmv", "baddbmm", "baddbmm_")
def product_and_sum(call: Call) -> Effect:
    """Matrix products added to another tensor."""
    addend, first, second = (argument.name for argument in call.target._schema.arguments[:3])
    return matrix_product(call, first, second, addend)


@rule("addbmm", "addbmm_")
def products_summed(call: Call) -> Effect:
    """(b, i, k) times (b, k, j), summed over b as well, and added to another tensor."""
    left, right = call.labels("batch1"), call.labels("batch2")
    batch = call.unify(left[0], right[0], CONTRACTED)
    inner = call.unify(left[2], right[1], CONTRACTED)
    labels = add_bias(call, (left[1], right[2]), call.outputs[0], "self")
    sizes = call.args["batch1"].shape
    return Effect(
        (labels,),
        contracted=tuple(((name,), dim) for name, dims in (("batch1", (0, 2)), ("batch2", (0, 1)))
                         for dim in dims),
        produced=((("batch1",), 1), (("batch2",), 2)),
        spans=((*zip(call.outputs[0].shape, labels, strict=True), (sizes[0], batch),
                (sizes[2], inner)),),
    )  # fmt: skip


@rule("addr", "addr_")
def outer_product_and_sum(call: Call) -> Effect:
    """Every entry of one vector times every entry of another, added to a matrix."""
    labels: Labels = (call.labels("vec1")[0], call.labels("vec2")[0])
    labels = add_bias(call, labels, call.outputs[0], "self")
    return Effect((labels,), spans=(tuple(zip(call.outputs[0].shape, labels, strict=True)),))


@rule("_grouped_mm")
def product_by_expert(call: Call) -> Effect:
    """Tokens (t, k), sorted by expert, times the weight (e, k, n) of the expert of each.

    An expert that is removed gets no tokens: the kept ones' offsets say all.  Kernels take rows of
    multiples of 16 bytes, so of other multiples in another type.
    """
    tokens, weights = call.labels("self"), call.labels("mat2")
    if len(tokens) != 2 or len(weights) != 3:
        return call.give_up("a grouped product of another kind than tokens by experts")
    call.pin(tokens[0], "tokens are counted off by expert")
    if call.is_state(call.args["offs"]):
        call.pin(weights[0], "offsets that are data")
    experts = call.unify(weights[0], call.labels("offs")[0], "tokens are counted off by expert")
    inner = call.unify(tokens[1], weights[1], CONTRACTED)
    labels: Labels = (None, weights[2])
    if call.args.get("bias") is not None:
        bias = call.labels("bias")
        call.unify(experts, bias[0], "tokens are counted off by expert")
        labels = (None, call.unify(weights[2], bias[-1]))
    first, second = call.args["self"], call.args["mat2"]
    multiple = max(16 // first.element_size(), 1)
    return Effect(
        (labels,),
        contracted=((("self",), 1), (("mat2",), 1)),
        produced=((("mat2",), 0), (("mat2",), 2)),
        mixing=((("mat2",), 0), (("offs",), 0)),
        spans=(((first.shape[0], None), (first.shape[1], inner), (second.shape[2], labels[1])),),
        aligned=((inner, multiple), (labels[1], multiple)),
    )


@rule("_sparse_addmm", "_sparse_mm", "_sparse_mm.reduce", "_sparse_mm_reduce_impl")
def sparse_product(call: Call) -> Effect:
    """A sparse matrix by a dense one, whose columns pass: nothing slices the sparse one."""
    first, second = [a.name for a in call.target._schema.arguments if str(a.type) == "Tensor"][-2:]
    columns = call.labels(second)[-1]
    for label in (*call.labels(first), *call.labels(second)[:-1]):
        call.pin(label, CONTRACTED)
    labels: Labels = (None, columns)
    if call.name == "_sparse_addmm":
        labels = add_bias(call, labels, call.outputs[0], "self")
    outer = zip(call.outputs[0].shape, labels, strict=True)
    stored = call.args[first]._nnz() / max(call.args[first].shape[0], 1)
    return Effect(
        (labels, *((None,) * out.dim() for out in call.outputs[1:])),
        produced=(((second,), 1),),
        spans=((*outer, (round(stored), None)),),
    )


@rule("_trilinear")
def trilinear(call: Call) -> Effect:
    """Three tensors, each stretched along dims of its own, multiplied and summed over some."""
    count = call.args["i1"].dim() + len(call.args["expand1"])
    joined: dict[int, Label | None] = {}
    sizes = [1] * count
    places: list[list[Place]] = [[] for _ in range(count)]
    for name, absent in (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")):
        own = sorted(set(range(count)).difference(call.args[absent]))
        for at, (dim, label) in enumerate(zip(own, call.labels(name), strict=True)):
            joined[dim] = call.unify(joined.get(dim, label), label, CONTRACTED)
            sizes[dim] = call.args[name].shape[at]
            places[dim].append(((name,), at))
    summed = call.args["sumdim"]
    passed = [dim for dim in range(count) if dim not in summed]
    return Effect(
        (tuple(joined.get(dim) for dim in passed),),
        contracted=tuple(chain.from_iterable(places[dim] for dim in summed)),
        produced=tuple(chain.from_iterable(places[dim] for dim in passed)),
        spans=(tuple(zip(sizes, map(joined.get, range(count)), strict=True)),),
    )


@rule("_cdist_forward", "_euclidean_dist")
def distances(call: Call) -> Effect:
    """Every row (…, P, M) against every row (…, R, M): removed features add nothing to a norm."""
    first, second = call.labels("x1"), call.labels("x2")
    inner = call.unify(first[-1], second[-1], CONTRACTED)
    shapes = call.args["x1"].shape, call.args["x2"].shape
    lead: list[Label | None] = []
    for dim in range(len(call.outputs[0].shape) - 2):
        at = dim - len(call.outputs[0].shape)
        met = [own[at] for own, shape in zip((first, second), shapes, strict=True)
               if -at <= len(shape) and shape[at] > 1]  # fmt: skip
        lead.append(call.join(met) if met else None)
    labels: Labels = (*lead, first[-2], second[-2])
    dims = tuple(len(shape) - 1 for shape in shapes)
    return Effect(
        (labels,),
        mixing=((("x1",), dims[0]), (("x2",), dims[1])),  # no product: zeros in one won't do
        produced=((("x1",), dims[0] - 1), (("x2",), dims[1] - 1)),
        spans=((*zip(call.outputs[0].shape, labels, strict=True), (shapes[0][-1], inner)),),
    )


@rule("dist")
def distance(call: Call) -> Effect:
    """The norm of a difference: removed positions of both add nothing."""
    first, second = call.labels("self"), call.labels("other")
    if call.args["self"].shape != call.args["other"].shape:
        return call.give_up("positions of one tensor meet a stretched one")
    for one, other in zip(first, second, strict=True):
        call.unify(one, other)
    places = tuple(((name,), dim) for name in ("self", "other") for dim in range(len(first)))
    return Effect(((),), mixing=places)


@rule("_pdist_forward")
def distances_within(call: Call) -> Effect:
    """Every row (P, M) against every later one, in their order: removed features add nothing."""
    rows, inner = call.labels("self")
    call.pin(rows, "pairs of positions are counted")
    count, width = call.args["self"].shape
    return Effect(
        ((None,),),
        mixing=((("self",), 1),),
        spans=(((count * (count - 1) // 2, None), (width, inner)),),
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


AROUND = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
"""Functions around a convolution, which take the number of groups as their seventh argument."""


def _stated_groups(call: Call, channels: Label | None) -> Equations:
    """The number of groups as the forward wrote it: that of the blocks of channels."""
    groups, given = call.args["groups"], call.given_to(*AROUND)
    if groups == 1 or channels is None or given is None:
        return ()
    written = expression_of(given.argument(6, "groups"))
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
    """Batch × channels of the weight × kernel × the positions it is applied to."""
    weight, labels = call.args["weight"], call.labels("weight")
    moved = call.args["transposed"]
    applied = call.args["input"] if moved else call.outputs[0]
    return (
        (applied.shape[0], out[0]),
        (weight.shape[0], labels[0] if moved else out[1]),
        (weight.shape[1], labels[1]),
        (prod(weight.shape[2:]) * prod(applied.shape[2:]), None),
    )
