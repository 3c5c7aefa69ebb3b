"""Reductions over dims, and operators on space that keep the leading dims."""

from __future__ import annotations

from typing import Any

import torch

from prunus.graph.axis import Label
from prunus.graph.program import Effect, Equations, Place
from prunus.tracer.provenance import expression_of
from prunus.tracer.registry import Call, rule
from prunus.tracer.rules.pointwise import broadcast


@rule("mean", "mean.dim", "sum", "sum.dim_IntList", "prod", "prod.dim_int", "amax", "amin", "max",
      "min", "max.dim", "min.dim", "aminmax", "logsumexp", "var", "var.dim", "var.correction",
      "std", "std.dim", "std.correction", "var_mean.correction", "std_mean.correction",
      "linalg_vector_norm", "norm.ScalarOpt_dim", "norm.ScalarOpt_dim_dtype", "norm.Scalar", "all",
      "all.dim", "all.dims", "any", "any.dim", "any.dims", "nansum", "_is_all_true",
      "_is_any_true", "count_nonzero", "count_nonzero.dim_IntList", "kthvalue", "median",
      "median.dim", "nanmedian", "nanmedian.dim", "mode")  # fmt: skip
def reduce(call: Call) -> Effect:
    """Reduced dims mix, the others pass; indices into a reduced dim keep it once they are read."""
    name = call.target._schema.arguments[0].name
    labels = call.labels(name)
    dims = _reduced(call, len(labels))
    mixing: list[Place] = []
    counted: list[tuple[int, Label]] = []
    for d in sorted(dims):
        label = labels[d]
        if label is None:
            continue
        if "k" in call.args:
            call.pin_first(label, call.args["k"], ENOUGH)
        mixing.append(((name,), d))
        counted += [(n, label) for n in indices_among(call)]
    out = [None if d in dims else label for d, label in enumerate(labels)]
    if not call.args.get("keepdim", False):
        out = [label for d, label in enumerate(labels) if d not in dims]
    return Effect(
        (tuple(out),) * len(call.outputs),
        mixing=tuple(mixing),
        counted=tuple(counted),
        equations=stated_count(call, "kthvalue"),
    )


def _reduced(call: Call, ndim: int) -> set[int]:
    """The dims that a reduction names: all of them where it names none."""
    dim: Any = call.args.get("dim")
    if isinstance(dim, int):
        dim = [dim]
    every = dim is None or (not dim and call.name not in ("all", "any"))
    return {d % max(ndim, 1) for d in (range(ndim) if every else dim)}


ENOUGH = "there have to be as many positions as are asked for"


def indices_among(call: Call) -> list[int]:
    """Which outputs hold positions along the dim that an operator reduces."""
    returns = call.target._schema.returns
    return [n for n, value in enumerate(returns) if value.name == "indices"]


def stated_count(call: Call, *names: str) -> Equations:
    """``k`` as the forward wrote it: as many positions come out whatever is removed."""
    given = call.given_to(*names)
    written = None if given is None else expression_of(given.argument(1, "k"))
    return () if written is None or isinstance(written, int) else ((written, call.args["k"], None),)


@rule("topk")
def largest(call: Call) -> Effect:
    """The ``k`` largest positions that are kept; their order along the dim is that of values."""
    labels = list(call.labels("self"))
    if not labels:
        return Effect(call.unlabelled())
    dim = call.args["dim"] % len(labels)
    label, labels[dim] = labels[dim], None
    if label is None:
        return Effect((tuple(labels),) * 2)
    return Effect(
        (tuple(labels),) * 2,
        mixing=((("self",), dim),),
        at_least=((label, call.args["k"]),),
        counted=((1, label),),
        equations=stated_count(call, "topk"),
    )


@rule("argmax", "argmin")
def extreme(call: Call) -> Effect:
    """The place of the largest or smallest of the positions that are kept."""
    labels = list(call.labels("self"))
    dim = call.args["dim"]
    if dim is None or not labels:
        return call.give_up(COUNTED)
    dim %= len(labels)
    label = labels.pop(dim)
    if call.args["keepdim"]:
        labels.insert(dim, None)
    if label is None:
        return Effect((tuple(labels),))
    return Effect((tuple(labels),), mixing=((("self",), dim),), counted=((0, label),))


@rule("histc")
def histogram(call: Call) -> Effect:
    """How often each position along a dim is among the values; of other values nothing is known."""
    label, bins = call.positions("self"), call.args["bins"]
    if label is None or bins != len(label) or (call.args["min"], call.args["max"]) != (0, bins - 1):
        call.pin(label, COUNTED)
        return call.give_up("values are counted off into bins")
    for own in call.labels("self"):
        call.pin(own, COUNTED)
    stated = None if call.given is None else expression_of(call.given.argument(1, "bins"))
    return Effect(((label,),), equations=(((bins if stated is None else stated), bins, label),))


@rule("multinomial", "sort", "sort.stable", "argsort", "nonzero", "triu",
      "tril", "triu_", "tril_", "cummax", "cummin")  # fmt: skip
def counted(call: Call) -> Effect:
    """Positions along a dim are counted or compared: they must stay; other dims pass."""
    labels = call.labels("self")
    dims = _counted_dims(call, len(labels))
    rest = call.keep(labels, dims, COUNTED)
    passed = tuple(label for d, label in enumerate(labels) if d not in dims)
    by_rank = {len(passed): passed, len(rest): rest}
    if any(out.dim() not in by_rank for out in call.outputs):
        call.keep(labels, range(len(labels)), COUNTED)
    return Effect(tuple(by_rank.get(out.dim(), (None,) * out.dim()) for out in call.outputs))


COUNTED = "positions along this dim are counted"


def _counted_dims(call: Call, ndim: int) -> set[int]:
    dim = call.args.get("dim", -1)
    if call.name == "nonzero" or dim is None:
        return set(range(ndim))
    return {ndim - 1, ndim - 2} if call.name.startswith("tri") else {dim % max(ndim, 1)}


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d",
      "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool2d", "upsample_nearest1d",
      "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
      "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
      "_upsample_bicubic2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
      "_upsample_nearest_exact3d", "upsample_nearest2d.vec", "upsample_bilinear2d.vec",
      "upsample_bicubic2d.vec", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
      "replication_pad1d", "replication_pad2d", "replication_pad3d", "grid_sampler_2d",
      "grid_sampler_3d", "max_unpool2d", "max_unpool3d")  # fmt: skip
def spatial(call: Call) -> Effect:
    """Works on the trailing one, two or three dims; leading ones pass."""
    name = call.target._schema.arguments[0].name
    labels = call.labels(name)
    rank = next(int(digit) for digit in call.name if digit.isdigit())
    call.keep(labels, range(-rank, 0), "space is read in windows")
    lead = labels[: len(labels) - rank]
    if "grid" in call.args:
        grid = call.labels("grid")
        call.keep(grid, range(1, len(grid)), "positions to sample at")
        lead = (call.unify(lead[0], grid[0]), *lead[1:])
    if "indices" in call.args:  # positions within the plane of each channel
        own = call.labels("indices")
        call.keep(own, range(-rank, 0), "space is read in windows")
        lead = tuple(call.unify(one, other) for one, other in zip(lead, own, strict=False))
    return Effect(tuple((*lead, *(None,) * rank) for _ in call.outputs))


@rule("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy",
      "binary_cross_entropy_with_logits")  # fmt: skip
def loss(call: Call) -> Effect:
    """Tensors compared entry by entry, and the sum or mean of that over the kept entries."""
    shape = torch.broadcast_shapes(*(tensor.shape for _, tensor in call.tensors()))
    labels = broadcast(call, len(shape), shape)
    if call.args["reduction"] == 0:
        return Effect((labels,))
    mixing = tuple(
        (path, dim)
        for path, tensor in call.tensors()
        for dim in range(tensor.dim())
        if tensor.shape[dim] == shape[dim - tensor.dim()] and labels[dim - tensor.dim()] is not None
    )
    return Effect(((),), mixing=mixing)


@rule("renorm", "renorm_")
def renorm(call: Call) -> Effect:
    """Slices along a dim, each scaled by its own norm, which is that of the kept positions."""
    labels = call.labels("self")
    own = call.args["dim"] % len(labels)
    mixing: tuple[Place, ...] = tuple((("self",), d) for d in range(len(labels)) if d != own)
    return Effect((labels,), mixing=mixing)
