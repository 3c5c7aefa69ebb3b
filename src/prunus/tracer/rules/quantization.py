"""Fake quantization, as in models that are trained for being quantized."""

from __future__ import annotations

from prunus.graph.program import Effect, Place
from prunus.tracer.registry import Call, rule

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
