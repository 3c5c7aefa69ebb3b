"""Operators that rearrange dims: views, permutations, slices, concatenation, padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from prunus.graph.axis import Axis, Label
from prunus.graph.expressions import Expression, Operation, Width
from prunus.graph.program import Effect, Equations, Labels
from prunus.tracer.provenance import expression_of
from prunus.tracer.registry import Call, rule


def wrap(dim: int, ndim: int) -> int:
    """A dim counted from the front."""
    return dim + ndim if dim < 0 else dim


def chunks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The smallest runs of dims of two shapes that hold the same number of elements.

    >>> [(list(a), list(b)) for a, b in chunks((2, 6, 5), (2, 3, 2, 5))]
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    i = j = 0
    while i < len(before) or j < len(after):
        start, first = i, j
        left = right = 1
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        yield range(start, i), range(first, j)


def reshaped(call: Call, labels: Labels, before: Sequence[int], after: Sequence[int]) -> Labels:
    """Labels after a row-major reshape."""
    if 0 in before:
        return (None,) * len(after)
    result: list[Label | None] = []
    why = call.why("viewed in blocks that must stay whole")
    for old, new in chunks(before, after):
        if len(old) == 1 and len(new) == 1:
            result.append(labels[old[0]])
            continue
        flat = call.algebra.merge([labels[i] for i in old], [before[i] for i in old])
        size = int(np.prod([before[i] for i in old], dtype=np.int64))
        for j in new[:-1]:
            size //= after[j]
            row, flat = call.algebra.split(flat, (after[j], size), why)
            result.append(row)
        if len(new):
            result.append(flat)
    return tuple(result)


def stated(call: Call, shape: Sequence[int], labels: Labels, *names: str) -> Equations:
    """Equations for the sizes that the forward wrote for the dims of an output.

    Only where the function around the operator is one of ``names``: other functions compute the
    sizes by themselves.
    """
    if call.given is None or call.given.name not in names:
        return ()
    sizes = call.given.sizes(len(shape))
    if sizes is None:
        return ()
    return tuple(
        (expression, size, label)
        for written, size, label in zip(sizes, shape, labels, strict=True)
        if size > 1 and (expression := expression_of(written)) is not None and written != -1
    )


def like_another(call: Call, labels: Labels) -> None:
    """``x.view_as(other)``: the sizes are those of another tensor."""
    other = call.given.other() if call.given is not None else None
    if other is not None and call.given is not None and call.given.name.endswith("_as"):
        for mine, theirs in zip(labels, call.labels_of(other), strict=True):
            if mine is not None:
                call.unify(mine, theirs, "the code takes one size for the other")


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy")
def view(call: Call) -> Effect:
    """Row-major reshapes: merge and split."""
    source, out = call.args["self"], call.outputs[0]
    labels = reshaped(call, call.labels("self"), source.shape, out.shape)
    like_another(call, labels)
    name = "size" if "size" in call.args else "shape"
    return Effect(
        (labels,),
        sizes={name: list(zip(out.shape, labels, strict=True))},
        equations=stated(call, out.shape, labels, "view", "reshape", "unflatten"),
    )


@rule("permute", "transpose.int", "transpose_", "t", "t_", "movedim.intlist")
def permute(call: Call) -> Effect:
    """Dims change places."""
    labels = list(call.labels("self"))
    ndim = len(labels)
    if call.name in ("t", "t_"):
        labels.reverse()
    elif call.name.startswith("transpose"):
        a, b = (wrap(call.args[name], ndim) for name in ("dim0", "dim1"))
        labels[a], labels[b] = labels[b], labels[a]
    elif call.name == "permute":
        labels = [labels[wrap(dim, ndim)] for dim in call.args["dims"]]
    else:
        call.pin_all("movedim is not modelled")
        labels = [None] * ndim
    return Effect((tuple(labels),))


@rule("unsqueeze", "unsqueeze_")
def unsqueeze(call: Call) -> Effect:
    """A new dim of size 1."""
    labels = list(call.labels("self"))
    labels.insert(wrap(call.args["dim"], len(labels) + 1), None)
    return Effect((tuple(labels),))


@rule("squeeze", "squeeze.dim", "squeeze.dims", "squeeze_.dim")
def squeeze(call: Call) -> Effect:
    """Dims of size 1 go; another one must not come down to that."""
    shape, labels = list(call.args["self"].shape), call.labels("self")
    chosen = call.args.get("dim", range(len(labels)))
    dims = {wrap(dim, len(labels)) for dim in ([chosen] if isinstance(chosen, int) else chosen)}
    if len(shape) < len(labels):  # squeezed in place already
        shape.insert(min(dims), 1)
    for dim in dims:
        label = labels[dim]
        if shape[dim] > 1 and label is not None:
            call.pin(label[:2], "a last position alone would be squeezed away")
    return Effect(
        (tuple(own for d, own in enumerate(labels) if not (d in dims and shape[d] == 1)),)
    )


@rule("expand")
def expand(call: Call) -> Effect:
    """Stretched dims hold copies: they take the labels of whatever they meet."""
    source, out = call.args["self"], call.outputs[0]
    own = (None,) * (out.dim() - source.dim()) + call.labels("self")
    shape = (1,) * (out.dim() - source.dim()) + tuple(source.shape)
    name = f"expand in {call.context.module or 'model'} #{call.algebra.count}"
    labels = tuple(
        label if size == stretched else call.algebra.copies(stretched, Axis(name, dim))
        for dim, (label, size, stretched) in enumerate(zip(own, shape, out.shape, strict=True))
    )
    like_another(call, labels)
    copies = [label for size, label in zip(shape, labels, strict=True) if size == 1]
    return Effect(
        (labels,),
        sizes={"size": list(zip(out.shape, labels, strict=True))},
        equations=stated(call, out.shape, labels, "expand", "broadcast_to")
        + interleaved(call, copies),
    )


def interleaved(call: Call, copies: Sequence[Label | None]) -> Equations:
    """``x.repeat_interleave(n)`` stretches one dim to n copies: as many as the forward wrote."""
    if call.given is None or call.given.name != "repeat_interleave":
        return ()
    times = expression_of(call.given.argument(1, "repeats"))
    stretched = [label for label in copies if label is not None]
    return () if times is None else tuple((times, len(label), label) for label in stretched)


def _times_written(call: Call, ndim: int) -> list[Any] | None:
    """How often each dim is repeated, as the forward wrote it; ``tile`` may leave out the first."""
    if call.given is None or call.given.name not in ("repeat", "tile"):
        return None
    for count in range(ndim, 0, -1):
        written = call.given.sizes(count)
        if written is not None:
            return [1] * (ndim - count) + written
    return None


@rule("repeat")
def repeat(call: Call) -> Effect:
    """Copies laid end to end: every copy keeps the same positions.

    There are as many copies as the forward writes; where it writes a width, they follow it.
    """
    source, out = call.args["self"], call.outputs[0]
    own = (None,) * (out.dim() - source.dim()) + call.labels("self")
    shape = (1,) * (out.dim() - source.dim()) + tuple(source.shape)
    repeats = call.args["repeats"]
    written = _times_written(call, out.dim())
    name = f"repeat in {call.context.module or 'model'} #{call.algebra.count}"
    copies: list[Label | None] = [None] * out.dim()
    equations: list[tuple[Expression, int, Label | None]] = []
    for dim, times in enumerate(repeats):
        expression = None if written is None else expression_of(written[dim])
        if times > 1 and expression is not None and not isinstance(expression, int):
            copies[dim] = call.algebra.copies(times, Axis(name, dim))
            equations.append((expression, times, copies[dim]))
    labels = tuple(
        call.algebra.merge(parts, (times, size))
        for parts, size, times in zip(zip(copies, own, strict=True), shape, repeats, strict=True)
    )
    return Effect(
        (labels,),
        sizes={"repeats": list(zip(repeats, copies, strict=True))},
        equations=tuple(equations),
    )


@rule("slice.Tensor")
def slice_(call: Call) -> Effect:
    """A range of a dim: whatever stands before a bound must stay as long as the bound says."""
    labels = list(call.labels("self"))
    dim = wrap(call.args["dim"], len(labels))
    size, label = call.args["self"].shape[dim], labels[dim]
    if label is None or call.outputs[0].shape[dim] == size:
        return Effect((tuple(labels),))
    start, stop = (call.args[name] for name in ("start", "end"))
    if call.args["step"] != 1 or _is_table(call, size, start, stop):
        call.pin(label, "sliced in steps, or a part of a table that this run needs")
        labels[dim] = None
        return Effect((tuple(labels),))
    bounds = [_bound(call, start, size, label)] if start else []
    if stop is not None and stop < size:
        bounds.append(_bound(call, stop, size, label))
    first = max((start or 0) + (size if (start or 0) < 0 else 0), 0)
    part = labels[dim] = label[first : first + call.outputs[0].shape[dim]]
    return Effect((tuple(labels),), at_least=((part, 1),), equations=tuple(bounds))


def _is_table(call: Call, size: int, *bounds: int | None) -> bool:
    """State of which a fixed number of positions is read: another input may need the others."""
    given = call.given
    stated = [bound for bound in bounds if bound and bound < size]  # an open end states nothing
    fixed = given is None or any(isinstance(given.expression(b), int) for b in stated)
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
    dim = wrap(call.args["dim"], len(labels))
    call.pin(labels[dim], "taken apart by position")
    del labels[dim]
    return Effect((tuple(labels),) * len(call.outputs))


@rule("split.Tensor", "unsafe_split.Tensor", "chunk", "unsafe_chunk")
def split(call: Call) -> Effect:
    """Equal pieces: each loses the same positions; unequal ones pin."""
    labels = list(call.labels("self"))
    dim = wrap(call.args["dim"], len(labels))
    sizes = [out.shape[dim] for out in call.outputs]
    equations: Equations = ()
    if len(set(sizes)) == 1:
        why = call.why("pieces of one tensor keep their places")
        piece, column = call.algebra.split(labels[dim], (len(sizes), sizes[0]), why)
        call.pin(piece, "pieces of one tensor keep their places")
        labels[dim] = column
        if call.given is not None and call.given.name == "split" and len(sizes) > 1:
            equations = ((call.given.expression(sizes[0]), sizes[0], column),)
    else:
        call.pin(labels[dim], "split into unequal pieces")
        labels[dim] = None
    return Effect((tuple(labels),) * len(sizes), equations=equations)


@rule("split_with_sizes", "unsafe_split_with_sizes")
def split_with_sizes(call: Call) -> Effect:
    """Pieces of sizes that the code states, each governed by what states it."""
    labels = list(call.labels("self"))
    dim = wrap(call.args["dim"], len(labels))
    label = labels[dim]
    if label is None:
        return Effect((tuple(labels),) * len(call.outputs))
    written = call.given.sizes(len(call.outputs)) if call.given is not None else None
    outputs: list[Labels] = []
    pieces: list[tuple[Label, int]] = []
    equations: list[tuple[Expression, int, Label | None]] = []
    start = 0
    for index, out in enumerate(call.outputs):
        size = out.shape[dim]
        piece = label[start : start + size]
        start += size
        stated_size = expression_of(written[index]) if written is not None else None
        equations.append((size if stated_size is None else stated_size, size, piece))
        pieces.append((piece, 1))
        outputs.append((*labels[:dim], piece, *labels[dim + 1 :]))
    return Effect(tuple(outputs), at_least=tuple(pieces), equations=tuple(equations))


@rule("cat")
def cat(call: Call) -> Effect:
    """Laid end to end along one dim, tied along the others."""
    tensors = call.args["tensors"]
    real = [index for index, tensor in enumerate(tensors) if tuple(tensor.shape) != (0,)]
    if not real:
        return Effect(call.unlabelled())
    parts = [call.labels("tensors", index) for index in real]
    dim = wrap(call.args["dim"], len(parts[0]))
    labels: list[Label | None] = []
    for position, column in enumerate(zip(*parts, strict=True)):
        if position == dim:
            labels.append(call.algebra.cat(column, [tensors[i].shape[dim] for i in real]))
        else:
            joined = column[0]
            for other in column[1:]:
                joined = call.unify(joined, other)
            labels.append(joined)
    return Effect((tuple(labels),))


@rule("stack")
def stack(call: Call) -> Effect:
    """Tied along every dim; the new one can't be pruned."""
    parts = [call.labels("tensors", index) for index in range(len(call.args["tensors"]))]
    labels: list[Label | None] = []
    for column in zip(*parts, strict=True):
        joined = column[0]
        for other in column[1:]:
            joined = call.unify(joined, other)
        labels.append(joined)
    labels.insert(wrap(call.args["dim"], len(labels) + 1), None)
    return Effect((tuple(labels),))


@rule("constant_pad_nd")
def pad(call: Call) -> Effect:
    """New positions stay, old ones keep their labels; cropping a labelled dim pins it."""
    labels = list(call.labels("self"))
    for index in range(len(call.args["pad"]) // 2):
        low, high = call.args["pad"][2 * index : 2 * index + 2]
        dim = len(labels) - 1 - index
        label = labels[dim]
        if label is None or (low == 0 and high == 0):
            continue
        if low < 0 or high < 0:
            call.pin(label, "cropped by a fixed number of positions")
            labels[dim] = None
        else:
            labels[dim] = call.algebra.cat((None, label, None), (low, len(label), high))
    return Effect((tuple(labels),))


@rule("flip")
def flip(call: Call) -> Effect:
    """A reversed dim has a reversed label."""
    labels = list(call.labels("self"))
    for dim in call.args["dims"]:
        label = labels[wrap(dim, len(labels))]
        labels[wrap(dim, len(labels))] = None if label is None else label[::-1]
    return Effect((tuple(labels),))


@rule("roll")
def roll(call: Call) -> Effect:
    """A fixed shift means other positions once some are gone: pins the rolled dims."""
    labels = list(call.labels("self"))
    dims = call.args["dims"] or range(len(labels))
    for dim in dims:
        call.pin(labels[wrap(dim, len(labels))], "rolled by a fixed number of positions")
        labels[wrap(dim, len(labels))] = None
    return Effect((tuple(labels),))


@rule("rot90")
def rotate(call: Call) -> Effect:
    """A plane turned by quarters, which stays whole."""
    labels = list(call.labels("self"))
    one, other = (wrap(dim, len(labels)) for dim in call.args["dims"])
    for dim in (one, other):
        call.pin(labels[dim], "turned in space")
        labels[dim] = None
    return Effect((tuple(labels),))


@rule("diagonal", "trace")
def diagonal(call: Call) -> Effect:
    """Positions that two dims share, so the two go together; the new dim comes last."""
    labels, shape = list(call.labels("self")), call.args["self"].shape
    one, other = (
        wrap(call.args.get(name, dim), len(labels)) for dim, name in enumerate(("dim1", "dim2"))
    )
    if shape[one] == shape[other] and not call.args.get("offset"):
        joined = call.unify(labels[one], labels[other], "a diagonal of the two dims")
    else:
        joined = None
        for dim in (one, other):
            call.pin(labels[dim], "a diagonal that is not the main one of a square")
    if call.name == "trace":
        return Effect(((),), mixing=((("self",), 0), (("self",), 1)))
    rest = [label for dim, label in enumerate(labels) if dim not in (one, other)]
    whole = call.outputs[0].shape[-1]
    return Effect(((*rest, None if joined is None or len(joined) != whole else joined),))


@rule("diag_embed")
def diagonal_matrix(call: Call) -> Effect:
    """The last dim becomes the main diagonal of two."""
    *labels, last = call.labels("self")
    if call.args["offset"]:
        call.pin(last, "a diagonal that is not the main one of a square")
        last = None
    count = len(labels) + 2
    for dim in sorted(wrap(call.args[name], count) for name in ("dim1", "dim2")):
        labels.insert(dim, last)
    return Effect((tuple(labels),))


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(call: Call) -> Effect:
    """C·r² channels become r × r pixels of C channels, or back."""
    labels = call.labels("self")
    for label in labels[-2:]:
        call.pin(label, "space is shuffled with channels")
    channels = call.args["self"].shape[-3]
    if call.name == "pixel_shuffle":
        square = call.args["upscale_factor"] ** 2
        why = call.why("the r × r channels of one pixel block stay together")
        out, phase = call.algebra.split(labels[-3], (channels // square, square), why)
        call.pin(phase, "the r × r channels of one pixel block stay together")
    else:
        square = call.args["downscale_factor"] ** 2
        out = call.algebra.merge((labels[-3], None), (channels, square))
    return Effect(((*labels[:-3], out, None, None),))


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Effect:
    """Channels seen as groups × rest and transposed."""
    labels, shape = call.labels("self"), call.args["self"].shape
    groups = call.args["groups"]
    sizes = (groups, shape[1] // groups)
    block, column = call.algebra.split(labels[1], sizes, call.why("shuffled in equal blocks"))
    call.pin(block, "the number of groups of a shuffle is fixed")
    out = call.algebra.merge((column, block), (sizes[1], sizes[0]))
    return Effect(((labels[0], out, *labels[2:]),))


@rule("as_strided", "as_strided_")
def as_strided(call: Call) -> Effect:
    """Passes where only the strides of dims of size 1 change; anything else pins."""
    labels, out = call.labels("self"), call.outputs[0]
    same = len(call.strides) == out.dim() and all(
        size == 1 or (old == new and (label is None or len(label) == size))
        for size, old, new, label in zip(
            out.shape, call.strides, call.args["stride"], labels, strict=False
        )
    )
    if same and not call.args["storage_offset"]:
        return Effect((labels,))
    call.pin_all("addressed by strides")
    return Effect(call.unlabelled())


@rule("resize_")
def resize(call: Call) -> Effect:
    """Passes where the size is as before, as where an observer takes down what it has seen."""
    labels, out = call.labels("self"), call.outputs[0]
    fits = len(labels) == out.dim() and all(
        label is None or len(label) == size for label, size in zip(labels, out.shape, strict=True)
    )
    if not fits:
        call.pin_all("memory is given another size")
        labels = call.unlabelled()[0]
    return Effect((labels,), sizes={"size": list(zip(out.shape, labels, strict=True))})


@rule("unfold")
def windows(call: Call) -> Effect:
    """Overlapping windows of a dim need all of it."""
    labels = list(call.labels("self"))
    dim = wrap(call.args["dimension"], len(labels))
    call.pin(labels[dim], "read in overlapping windows")
    labels[dim] = None
    return Effect(((*labels, None),))


@rule("im2col", "col2im")
def columns(call: Call) -> Effect:
    """Patches as columns: channel-major, so a channel owns the columns of its window."""
    labels = call.labels("self")
    window = int(np.prod(call.args["kernel_size"]))
    at = len(labels) - (3 if call.name == "im2col" else 2)
    for label in labels[at + 1 :]:
        call.pin(label, "space is read in windows")
    channels = call.args["self"].shape[at]
    if call.name == "im2col":
        out = call.algebra.merge((labels[at], None), (channels, window))
        return Effect(((*labels[:at], out, None),))
    why = call.why("the columns of one window stay together")
    out, rest = call.algebra.split(labels[at], (channels // window, window), why)
    call.pin(rest, "the columns of one window stay together")
    return Effect(((*labels[:at], out, None, None),))


@rule("glu")
def gated(call: Call) -> Effect:
    """The halves of a dim meet, so each loses the same positions."""
    labels = list(call.labels("self"))
    dim = wrap(call.args["dim"], len(labels))
    why = call.why("halves of one tensor keep their places")
    sizes = (2, call.args["self"].shape[dim] // 2)
    half, labels[dim] = call.algebra.split(labels[dim], sizes, why)
    call.pin(half, why.reason)
    return Effect((tuple(labels),))


@rule("view_as_real", "view_as_complex")
def complex_parts(call: Call) -> Effect:
    """A last dim of two, the real and the imaginary part, comes or goes."""
    labels = call.labels("self")
    if call.name == "view_as_real":
        return Effect(((*labels, None),))
    call.pin(labels[-1], "real and imaginary part")
    return Effect((labels[:-1],))
