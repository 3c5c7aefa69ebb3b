"""Normalisations and fake quantization: statistics of positions, of all or per channel.

Batch norm carries, the others mix the positions that they normalise over.
"""

from __future__ import annotations

from prunus.graph.axis import Label
from prunus.graph.program import Effect, Equations, Labels, Place
from prunus.tracer.registry import Call, rule


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit.no_stats",
      "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm")  # fmt: skip
def batch_norm(call: Call) -> Effect:
    """One statistic per channel; in training mode it is taken over all other dims."""
    labels = list(call.labels("input"))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.args.get(name) is not None:
            labels[1] = call.unify(labels[1], call.labels(name)[0])
    mixing: tuple[Place, ...] = ()
    if call.args.get("training"):
        rest = (0, *range(2, len(labels)))
        mixing = tuple((("input",), dim) for dim in rest if labels[dim] is not None)
    size = call.args["input"].shape[1]
    statistics = [
        (labels[1],) if tuple(out.shape) == (size,) else (None,) * out.dim()
        for out in call.outputs[1:]
    ]
    return Effect((tuple(labels), *statistics), mixing=mixing)


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Effect:
    """Normalised over the last dims, with a scale and a shift per position."""
    labels = list(call.labels("input"))
    count = len(call.args["normalized_shape"])
    mixing: list[Place] = []
    for dim in range(len(labels) - count, len(labels)):
        for name in ("weight", "bias"):
            if call.args.get(name) is not None:
                own = dim - len(labels) + count
                labels[dim] = call.unify(labels[dim], call.labels(name)[own])
                mixing.append(((name,), own))
        mixing.append((("input",), dim))
    reduced: Labels = (*labels[: len(labels) - count], *(None,) * count)
    outputs = (tuple(labels), *(reduced[: out.dim()] for out in call.outputs[1:]))
    sizes = list(zip(call.args["normalized_shape"], labels[-count:], strict=True))
    return Effect(outputs, mixing=tuple(mixing), sizes={"normalized_shape": sizes})


@rule("native_group_norm")
def group_norm(call: Call) -> Effect:
    """Normalised within equal blocks of channels: every block keeps the same places."""
    labels = list(call.labels("input"))
    channels, groups = call.args["C"], call.args["group"]
    for name in ("weight", "bias"):
        if call.args[name] is not None:
            labels[1] = call.unify(labels[1], call.labels(name)[0])
    call.keep(labels, range(2, len(labels)), "normalised over space")
    sizes = (groups, channels // groups)
    block, column = call.algebra.split(labels[1], sizes, call.why("normalised in equal blocks"))
    mixing: tuple[Place, ...] = ()
    if column is not None:
        named = [name for name in ("weight", "bias") if call.args[name] is not None]
        mixing = ((("input",), 1), *(((name,), 0) for name in named))
    whole: Labels = (labels[0], call.algebra.canonical(labels[1]), *(None,) * (len(labels) - 2))
    statistics: tuple[Label | None, ...] = (labels[0], block)
    return Effect(
        (whole, statistics, statistics),
        mixing=mixing,
        sizes={"C": (channels, whole[1]), "group": (groups, block)},
        equations=_stated_groups(call, groups, block),
    )


def _stated_groups(call: Call, groups: int, block: Label | None) -> Equations:
    """The number of groups, where the forward wrote it; a module's own follows its weight."""
    given = call.given_to("group_norm")
    return () if given is None or groups == 1 else ((given.expression(groups), groups, block),)


@rule("_weight_norm_interface")
def weight_norm(call: Call) -> Effect:
    """g · v / ‖v‖, with one norm per position along a dim: it spans all the others."""
    labels = list(call.labels("v"))
    own = call.args["dim"] % len(labels)
    labels[own] = call.unify(labels[own], call.labels("g")[own])
    mixing: tuple[Place, ...] = tuple((("v",), dim) for dim in range(len(labels)) if dim != own)
    norms: Labels = tuple(label if dim == own else None for dim, label in enumerate(labels))
    return Effect((tuple(labels), norms), mixing=mixing)


@rule("_softmax", "_log_softmax", "softmax.int", "log_softmax.int", "_safe_softmax")  # fmt: skip
def softmax(call: Call) -> Effect:
    """Every position along the dim sees the others."""
    labels = call.labels("self")
    dim = call.args["dim"] % max(len(labels), 1)
    mixing: tuple[Place, ...] = ((("self",), dim),) if labels and labels[dim] is not None else ()
    return Effect((labels,), mixing=mixing)


@rule("cumsum")
def running_sum(call: Call) -> Effect:
    """Every position is the sum of those up to it, to which removed ones add nothing."""
    labels = call.labels("self")
    if not labels:
        return Effect((labels,))
    return Effect((labels,), contracted=((("self",), call.args["dim"] % len(labels)),))


@rule("cumprod", "logcumsumexp")
def cumulate(call: Call) -> Effect:
    """Every position sees those before it: the order matters, so the dim stays whole."""
    return Effect((call.keep(call.labels("self"), (call.args["dim"],), "summed up in order"),))


OBSERVED = (
    "an observer without statistics: prune before prepare_qat, or run the model on data first"
)


@rule("_fused_moving_avg_obs_fq_helper")
def observe_and_quantize(call: Call) -> Effect:
    """Rounded to a grid that follows the least and greatest kept value, of all or per channel."""
    labels = list(call.labels("self"))
    names = ("running_min", "running_max", "scale", "zero_point")
    axis = call.args["ch_axis"] % len(labels) if call.args["per_row_fake_quant"] else None
    for name in names:
        own = call.labels(name)
        if axis is None:
            for label in own:
                call.pin(label, "one grid for all")
        else:
            labels[axis] = call.unify(labels[axis], own[0], OBSERVED)
    mixing: tuple[Place, ...] = tuple((("self",), d) for d in range(len(labels)) if d != axis)
    whole = tuple(labels)
    return Effect((whole, whole), mixing=mixing)


@rule(
    "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
)
def quantize(call: Call) -> Effect:
    """Every entry rounded to one grid."""
    for name in ("scale", "zero_point", "fake_quant_enabled"):
        for label in call.labels(name) if hasattr(call.args.get(name), "dim") else ():
            call.pin(label, "one grid for all")
    return Effect((call.labels("self"),) * len(call.outputs))


@rule("fake_quantize_per_channel_affine_cachemask")
def quantize_per_channel(call: Call) -> Effect:
    """Every channel rounded to a grid of its own."""
    labels = list(call.labels("self"))
    axis = call.args["axis"] % len(labels)
    for name in ("scale", "zero_point"):
        labels[axis] = call.unify(labels[axis], call.labels(name)[0], OBSERVED)
    return Effect((tuple(labels),) * len(call.outputs))
