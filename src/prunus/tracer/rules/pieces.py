"""Operators that take parts of dims, or lay them end to end."""

from __future__ import annotations

from math import prod

import numpy as np

from prunus.graph.axis import Label
from prunus.graph.expressions import Expression, Operation, Width
from prunus.graph.program import Effect, Equations, Labels
from prunus.tracer.provenance import expression_of
from prunus.tracer.registry import Call, rule

PLACES = "pieces of one tensor keep their places"
SLICED = "sliced in steps, or a part of a table that this run needs"


@rule("slice.Tensor")
def slice_(call: Call) -> Effect:
    """A range of a dim: whatever stands before a bound must stay as long as the bound says."""
    labels = list(call.labels("self"))
    dim = call.args["dim"]
    size, label = call.args["self"].shape[dim], labels[dim]
    if label is None or call.outputs[0].shape[dim] == size:
        return Effect((tuple(labels),))
    start, stop = call.args["start"] or 0, call.args["end"]
    stop = size if stop is None else stop
    if call.args["step"] != 1 or _is_table(call, size, start, stop):
        return Effect((call.keep(labels, (dim,), SLICED),))
    bounds = [_bound(call, start, size, label)] if start else []
    if stop < size:
        bounds.append(_bound(call, stop, size, label))
    first = max(start + size if start < 0 else start, 0)
    part = labels[dim] = label[first : first + call.outputs[0].shape[dim]]
    return Effect((tuple(labels),), at_least=((part, 1),), equations=tuple(bounds))


def _is_table(call: Call, size: int, *bounds: int) -> bool:
    """State of which a fixed number of positions is read: another input may need the others."""
    given = call.given
    written = [bound for bound in bounds if bound and bound < size]  # an open end states nothing
    fixed = given is None or any(isinstance(given.expression(b), int) for b in written)
    return fixed and call.is_state(call.args["self"])


def _bound(call: Call, bound: int, size: int, label: Label) -> tuple[Expression, int, Label | None]:
    """The equation for one bound of a slice; a fixed one keeps the positions that it counts."""
    expression: Expression = call.given.expression(bound) if call.given is not None else bound
    position = bound + size if bound < 0 else bound
    if not 0 <= position <= size:
        return size, size, label
    if isinstance(expression, int):
        counted = label[position:] if bound < 0 else label[:position]
        return len(counted), len(counted), counted
    if bound < 0:
        expression = Operation("+", Width(size, label), expression)
    return expression, position, label[:position]


@rule("select.int", "unbind.int")
def select(call: Call) -> Effect:
    """A dim is taken apart, so each of its positions must stay."""
    labels = list(call.labels("self"))
    call.pin(labels.pop(call.args["dim"]), "taken apart by position")
    return Effect((tuple(labels),) * len(call.outputs))


@rule("split.Tensor", "unsafe_split.Tensor", "chunk", "unsafe_chunk")
def split(call: Call) -> Effect:
    """Equal pieces: each loses the same positions; unequal ones pin."""
    labels = list(call.labels("self"))
    dim = call.args["dim"]
    sizes = [out.shape[dim] for out in call.outputs]
    equations: Equations = ()
    if len(set(sizes)) == 1:
        shape = len(sizes), sizes[0]
        column = labels[dim] = call.split(labels[dim], shape, PLACES, pinned=0)
        given = call.given_to("split")
        if given is not None and len(sizes) > 1:
            equations = ((given.expression(sizes[0]), sizes[0], column),)
    else:
        labels = list(call.keep(labels, (dim,), "split into unequal pieces"))
    return Effect((tuple(labels),) * len(sizes), equations=equations)


@rule("split_with_sizes", "unsafe_split_with_sizes")
def split_with_sizes(call: Call) -> Effect:
    """Pieces of sizes that the code states, each governed by what states it."""
    labels = list(call.labels("self"))
    dim = call.args["dim"] % len(labels)
    label = labels[dim]
    if label is None:
        return Effect((tuple(labels),) * len(call.outputs))
    sizes = [out.shape[dim] for out in call.outputs]
    written = call.given.sizes(len(sizes)) if call.given is not None else None
    pieces = np.split(label, np.cumsum(sizes)[:-1])
    expressions = map(expression_of, sizes if written is None else written)
    given = [size if own is None else own for own, size in zip(expressions, sizes, strict=True)]
    return Effect(
        tuple((*labels[:dim], piece, *labels[dim + 1 :]) for piece in pieces),
        at_least=tuple((piece, 1) for piece in pieces),
        equations=tuple(zip(given, sizes, pieces, strict=True)),
    )


@rule("cat")
def cat(call: Call) -> Effect:
    """Laid end to end along one dim, tied along the others."""
    tensors = call.args["tensors"]
    real = [index for index, tensor in enumerate(tensors) if tuple(tensor.shape) != (0,)]
    if not real:
        return Effect(call.unlabelled())
    parts = [call.labels("tensors", index) for index in real]
    dim = call.args["dim"] % len(parts[0])
    sizes = [tensors[index].shape[dim] for index in real]
    labels = tuple(
        call.algebra.cat(column, sizes) if position == dim else call.join(column)
        for position, column in enumerate(zip(*parts, strict=True))
    )
    return Effect((labels,))


@rule("stack")
def stack(call: Call) -> Effect:
    """Tied along every dim; the new one can't be pruned."""
    parts = [call.labels("tensors", index) for index in range(len(call.args["tensors"]))]
    labels: list[Label | None] = [call.join(column) for column in zip(*parts, strict=True)]
    labels.insert(call.args["dim"] % (len(labels) + 1), None)
    return Effect((tuple(labels),))


@rule("constant_pad_nd")
def pad(call: Call) -> Effect:
    """New positions stay, old ones keep their labels; cropping a labelled dim pins it."""
    labels: Labels = call.labels("self")
    for index in range(len(call.args["pad"]) // 2):
        low, high = call.args["pad"][2 * index : 2 * index + 2]
        dim = len(labels) - 1 - index
        label = labels[dim]
        if label is None or (low == 0 and high == 0):
            continue
        if low < 0 or high < 0:
            labels = call.keep(labels, (dim,), "cropped by a fixed number of positions")
        else:
            padded = call.algebra.cat((None, label, None), (low, len(label), high))
            labels = (*labels[:dim], padded, *labels[dim + 1 :])
    return Effect((labels,))


@rule("roll", "rot90", "_fft_r2c", "_fft_c2r", "_fft_c2c")
def moved(call: Call) -> Effect:
    """A fixed shift, quarter turns, sums over all positions: the dims stay whole."""
    reason = {"roll": "rolled by a fixed number of positions", "rot90": "turned in space"}
    labels = call.labels("self")
    dims = call.args.get("dims", call.args.get("dim")) or range(len(labels))
    why = reason.get(call.name, "positions along this dim are transformed")
    return Effect((call.keep(labels, dims, why),))


@rule("unfold")
def windows(call: Call) -> Effect:
    """Overlapping windows of a dim need all of it."""
    labels, dim = call.labels("self"), call.args["dimension"]
    return Effect(((*call.keep(labels, (dim,), "read in overlapping windows"), None),))


@rule("im2col", "col2im")
def columns(call: Call) -> Effect:
    """Patches as columns: channel-major, so a channel owns the columns of its window."""
    labels = call.labels("self")
    window = prod(call.args["kernel_size"])
    at = len(labels) - (3 if call.name == "im2col" else 2)
    call.keep(labels, range(at + 1, len(labels)), "space is read in windows")
    channels = call.args["self"].shape[at]
    if call.name == "im2col":
        out = call.algebra.merge((labels[at], None), (channels, window))
        return Effect(((*labels[:at], out, None),))
    together = "the columns of one window stay together"
    out = call.split(labels[at], (channels // window, window), together, pinned=1)
    return Effect(((*labels[:at], out, None, None),))


@rule("glu")
def gated(call: Call) -> Effect:
    """The halves of a dim meet, so each loses the same positions."""
    labels = list(call.labels("self"))
    dim = call.args["dim"]
    half = call.args["self"].shape[dim] // 2
    places = "halves of one tensor keep their places"
    labels[dim] = call.split(labels[dim], (2, half), places, pinned=0)
    return Effect((tuple(labels),))
