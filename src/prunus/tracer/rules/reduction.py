"""Reductions over dims, and operators on space that keep the leading dims."""

from __future__ import annotations

from typing import Any

from prunus.graph.axis import Label
from prunus.tracer.registry import Call, Effect, Place, rule
from prunus.tracer.rules.view import wrap


@rule(
    "mean",
    "mean.dim",
    "sum",
    "sum.dim_IntList",
    "prod",
    "prod.dim_int",
    "amax",
    "amin",
    "max",
    "min",
    "max.dim",
    "min.dim",
    "aminmax",
    "logsumexp",
    "var",
    "var.dim",
    "var.correction",
    "std",
    "std.dim",
    "std.correction",
    "var_mean.correction",
    "std_mean.correction",
    "linalg_vector_norm",
    "norm.ScalarOpt_dim",
    "norm.ScalarOpt_dim_dtype",
    "norm.Scalar",
    "all",
    "all.dim",
    "all.dims",
    "any",
    "any.dim",
    "any.dims",
    "nansum",
)
def reduce(call: Call) -> Effect:
    """Reduced dims mix, the others pass."""
    name = call.target._schema.arguments[0].name
    labels = call.labels(name)
    dim = call.args.get("dim")
    every = dim is None or (
        not isinstance(dim, int) and not dim and call.name not in ("all", "any")
    )
    chosen: Any = range(len(labels)) if every else [dim] if isinstance(dim, int) else dim
    dims = {wrap(d, len(labels)) for d in chosen}
    indexed = call.name in ("max", "min") and "dim" in call.args
    mixing: list[Place] = []
    for d in sorted(dims):
        if indexed:
            call.pin(labels[d], "positions along this dim are counted")
        elif labels[d] is not None:
            mixing.append(((name,), d))
    keep = bool(call.args.get("keepdim", False))
    out: list[Label | None] = []
    for d, label in enumerate(labels):
        if d not in dims:
            out.append(label)
        elif keep:
            out.append(None)
    return Effect((tuple(out),) * len(call.outputs), mixing=tuple(mixing))


@rule(
    "argmax",
    "argmin",
    "topk",
    "sort",
    "sort.stable",
    "argsort",
    "nonzero",
    "triu",
    "tril",
    "kthvalue",
    "triu_",
    "tril_",
    "cummax",
    "cummin",
    "mode",
    "median.dim",
    "nanmedian.dim",
)
def counted(call: Call) -> Effect:
    """Positions along a dim are counted or compared: they must stay; other dims pass."""
    labels = call.labels("self")
    dim = call.args.get("dim", -1)
    if call.name in ("nonzero",) or dim is None:
        dims = set(range(len(labels)))
    elif call.name.startswith("tri"):
        dims = {len(labels) - 1, len(labels) - 2}
    else:
        dims = {wrap(dim, len(labels))}
    for d in dims:
        call.pin(labels[d], "positions along this dim are counted")
    rest = [None if d in dims else label for d, label in enumerate(labels)]
    outputs = []
    for out in call.outputs:
        if out.dim() == len(labels):
            outputs.append(tuple(rest))
        elif out.dim() == len(labels) - len(dims):
            outputs.append(tuple(own for d, own in enumerate(labels) if d not in dims))
        else:
            for label in labels:
                call.pin(label, "positions along this dim are counted")
            outputs.append((None,) * out.dim())
    return Effect(tuple(outputs))


@rule(
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "max_pool2d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "upsample_nearest2d.vec",
    "upsample_bilinear2d.vec",
    "upsample_bicubic2d.vec",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "grid_sampler_2d",
    "grid_sampler_3d",
)
def spatial(call: Call) -> Effect:
    """Works on the trailing one, two or three dims; leading ones pass."""
    name = call.target._schema.arguments[0].name
    labels = call.labels(name)
    rank = next(int(digit) for digit in call.name if digit.isdigit())
    for label in labels[len(labels) - rank :]:
        call.pin(label, "space is read in windows")
    lead = labels[: len(labels) - rank]
    if "grid" in call.args:
        batch, *rest = call.labels("grid")
        for label in rest:
            call.pin(label, "positions to sample at")
        lead = (call.unify(lead[0], batch), *lead[1:])
    return Effect(tuple((*lead, *(None,) * rank) for _ in call.outputs))


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(call: Call) -> Effect:
    """Every frequency is a sum over all positions, in their places."""
    labels = list(call.labels("self"))
    for dim in call.args["dim"]:
        call.pin(labels[wrap(dim, len(labels))], "positions along this dim are transformed")
        labels[wrap(dim, len(labels))] = None
    return Effect((tuple(labels),))
