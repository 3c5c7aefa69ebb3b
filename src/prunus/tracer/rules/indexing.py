"""Look-ups by index: the dim that is addressed stays whole, the others pass.

Where the index holds positions along another dim, as a router's choice among its experts does, the
dim that it addresses is tied to that one instead: both lose the same positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunus.graph.axis import Label
from prunus.graph.program import Effect, Labels
from prunus.tracer.registry import Call, rule

ADDRESSED = "positions along this dim are addressed by index"


def address(call: Call, label: Label | None, name: str, index: int | None = None) -> Label | None:
    """Tie a dim to the one along which an index holds positions, or pin it; returns its label."""
    named = call.positions(name, index)
    if named is None:
        call.pin(label, ADDRESSED)
        return None
    return call.unify(label, named, "addressed by positions along another dim")


@rule("embedding")
def embedding(call: Call) -> Effect:
    """Rows of a table."""
    rows, columns = call.labels("weight")
    address(call, rows, "indices")
    return Effect(((*call.labels("indices"), columns),), produced=((("weight",), 1),))


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: Call) -> Effect:
    """Rows of a table, summed up bag by bag (or their mean, or the maximum of each column)."""
    rows, columns = call.labels("weight")
    call.pin(rows, ADDRESSED)
    for name in ("indices", "offsets", "per_sample_weights"):
        for label in call.labels(name):
            call.pin(label, "indices are counted off by bag")
    outputs = tuple((None, columns) if out.dim() == 2 else (None,) for out in call.outputs)
    return Effect(outputs, produced=((("weight",), 1),))


@rule("index_select")
def index_select(call: Call) -> Effect:
    """Chosen positions of one dim."""
    labels = list(call.labels("self"))
    if labels:
        address(call, labels[call.args["dim"]], "index")
        labels[call.args["dim"]] = next(iter(call.labels("index")), None)
    return Effect((tuple(labels),))


@rule("gather")
def gather(call: Call) -> Effect:
    """Chosen positions of one dim, separately at every other position."""
    source, index = call.labels("self"), call.labels("index")
    if len(source) != len(index):  # a scalar stands for a single position
        call.pin(next(iter(source), None), ADDRESSED)
        return Effect((index,))
    if not source:
        return Effect(call.unlabelled())
    dim = call.args["dim"] % len(source)
    labels: list[Label | None] = list(index)
    for d, (ours, theirs) in enumerate(zip(source, index, strict=True)):
        if d == dim:
            address(call, ours, "index")
        elif call.args["self"].shape[d] == call.args["index"].shape[d]:
            labels[d] = call.unify(ours, theirs)
        else:
            call.pin(ours, ADDRESSED)
            call.pin(theirs, ADDRESSED)
            labels[d] = None
    return Effect((tuple(labels),))


@rule("index.Tensor", "_unsafe_index.Tensor")
def index(call: Call) -> Effect:
    """Advanced indexing: addressed dims give way to the index's own."""
    _, found = _address(call)
    return Effect((found,))


@rule("index_put", "index_put_", "_index_put_impl_")
def index_put(call: Call) -> Effect:
    """Written by advanced indexing: values are tied to the dims that are not addressed."""
    labels, found = _address(call)
    values, shape = call.labels("values"), call.args["values"].shape
    for label, size, own in zip(values[::-1], shape[::-1], found[::-1], strict=False):
        if size > 1:
            call.unify(label, own, ADDRESSED)
    return Effect((labels,))


def _address(call: Call) -> tuple[Labels, Labels]:
    """Pin what indices address: labels of the tensor, and of what they look up in it."""
    labels = list(call.labels("self"))
    indices = call.args["indices"]
    rest: list[Label | None] = []
    dim = new = 0
    at: int | None = None
    for number, item in enumerate(indices):
        if item is None:
            rest.append(labels[dim])
            dim += 1
            continue
        at = len(rest) if at is None else at
        boolean = item.dtype in (torch.bool, torch.uint8)
        new = max(new, 1 if boolean else item.dim())
        for label in call.labels("indices", number):
            call.pin(label, ADDRESSED)
        for _ in range(item.dim() if boolean else 1):
            labels[dim] = address(call, labels[dim], "indices", number)
            dim += 1
    rest += labels[dim:]
    if at is None or _are_apart(indices):
        at = 0  # PyTorch puts new dims first if indices are apart
    return tuple(labels), (*rest[:at], *(None,) * new, *rest[at:])


def _are_apart(indices: Sequence[Tensor | None]) -> bool:
    used = [number for number, item in enumerate(indices) if item is not None]
    return used != list(range(used[0], used[0] + len(used)))


@rule("scatter.src", "scatter.value", "scatter_.src", "scatter_.value", "scatter_add",
      "scatter_add_", "scatter_reduce.two", "scatter_reduce_.two")  # fmt: skip
def scatter(call: Call) -> Effect:
    """Written to chosen positions of one dim, separately at every other position."""
    names = [name for name in ("self", "index", "src") if isinstance(call.args.get(name), Tensor)]
    shapes = [call.args[name].shape for name in names]
    if len({len(shape) for shape in shapes}) > 1:  # a scalar stands for a single position
        return call.give_up(ADDRESSED)
    columns = zip(*(call.labels(name) for name in names), strict=True)
    dim = call.args["dim"] % max(len(shapes[0]), 1)
    sizes = zip(*shapes, strict=True)
    labels = tuple(
        call.join(column)
        if d != dim and len(set(own)) == 1
        else _written(call, column, named=d == dim)
        for d, (column, own) in enumerate(zip(columns, sizes, strict=True))
    )
    return Effect((labels,))


def _written(call: Call, column: Labels, *, named: bool) -> Label | None:
    """The label of a dim to which positions are written that an index may name."""
    named = named and call.positions("index") is not None
    call.keep(column, range(1 if named else 0, len(column)), ADDRESSED)
    return address(call, column[0], "index") if named else None


@rule("index_fill.int_Scalar", "index_fill_.int_Scalar", "index_fill.int_Tensor",
      "index_fill_.int_Tensor")  # fmt: skip
def index_fill(call: Call) -> Effect:
    """Chosen positions of one dim get one number."""
    for label in call.labels("index"):
        call.pin(label, ADDRESSED)
    return Effect((call.keep(call.labels("self"), (call.args["dim"],), ADDRESSED),))


@rule("masked_scatter", "masked_scatter_")
def masked_scatter(call: Call) -> Effect:
    """Entries of the source go, in order, where the mask is true.

    A mask that is stretched along the last dim takes whole rows of the source, so that the last
    dims of all three go together; all that is counted through stays.
    """
    mask, source = call.args["mask"], call.args["source"]
    shape = call.outputs[0].shape
    labels = list(call.labels("self"))
    rows = (
        len(labels) > 0
        and source.dim() > 0
        and tuple(mask.shape) == tuple(shape)
        and mask.stride(-1) == 0
        and source.shape[-1] == shape[-1]
        and tuple(call.args["self"].shape) == tuple(shape)
    )
    if not rows:
        return call.give_up("entries are counted through a mask")
    for label in (*labels[:-1], *call.labels("mask")[:-1], *call.labels("source")[:-1]):
        call.pin(label, "entries are counted through a mask")
    column = call.unify(labels[-1], call.labels("source")[-1])
    column = call.unify(column, call.labels("mask")[-1])
    return Effect(((*(None,) * (len(labels) - 1), column),))


@rule("segment_reduce")
def segments(call: Call) -> Effect:
    """Segments of one dim, each reduced; the others pass."""
    labels = call.labels("data")
    axis = call.args["axis"] % len(labels)
    for name in ("lengths", "indices", "offsets"):
        for label in call.labels(name):
            call.pin(label, "a dim is cut into segments")
    return Effect((call.keep(labels, range(axis + 1), "a dim is cut into segments"),))


@rule("bucketize.Tensor", "searchsorted.Tensor")
def bucket(call: Call) -> Effect:
    """Every number by itself, against boundaries that stay."""
    boundaries = "boundaries" if call.name == "bucketize" else "sorted_sequence"
    for label in call.labels(boundaries):
        call.pin(label, "boundaries are searched in order")
    if call.args[boundaries].dim() == 1:
        return Effect((call.labels("self"),))
    return call.give_up("boundaries are searched in order")


@rule("index_add", "index_add_", "index_copy", "index_copy_", "index_reduce", "index_reduce_")
def index_write(call: Call) -> Effect:
    """Slices written to chosen positions of one dim, and tied along the others."""
    labels, source = list(call.labels("self")), call.labels("source")
    for label in call.labels("index"):
        call.pin(label, ADDRESSED)
    if not labels or len(labels) != len(source):
        return call.give_up(ADDRESSED)
    dim = call.args["dim"] % len(labels)
    for d, (ours, theirs) in enumerate(zip(labels, source, strict=True)):
        if d != dim:
            labels[d] = call.unify(ours, theirs)
    for label in (labels[dim], source[dim]):
        call.pin(label, ADDRESSED)
    labels[dim] = None
    return Effect((tuple(labels),))
