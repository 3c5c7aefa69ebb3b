"""Operators that rearrange dims: views, permutations, copies, diagonals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from prunus.graph.axis import Axis, Label
from prunus.graph.expressions import Expression
from prunus.graph.program import Effect, Equations, Labels
from prunus.tracer.provenance import expression_of
from prunus.tracer.registry import Call, rule


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
    given = call.given_to(*names)
    sizes = None if given is None else given.sizes(len(shape))
    if sizes is None:
        return ()
    return tuple(
        (expression, size, label)
        for written, size, label in zip(sizes, shape, labels, strict=True)
        if size > 1 and (expression := expression_of(written)) is not None and written != -1
    )


def like_another(call: Call, labels: Labels) -> None:
    """``x.view_as(other)``: the sizes are those of another tensor."""
    given = call.given
    other = given.other() if given is not None and given.name.endswith("_as") else None
    if other is not None:
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
    if call.name in ("t", "t_"):
        labels.reverse()
    elif call.name.startswith("transpose"):
        a, b = call.args["dim0"], call.args["dim1"]
        if labels:
            labels[a], labels[b] = labels[b], labels[a]
    elif call.name == "permute":
        labels = [labels[dim] for dim in call.args["dims"]]
    else:
        call.pin_all("movedim is not modelled")
        labels = [None] * len(labels)
    return Effect((tuple(labels),))


@rule("unsqueeze", "unsqueeze_")
def unsqueeze(call: Call) -> Effect:
    """A new dim of size 1."""
    labels = list(call.labels("self"))
    labels.insert(call.args["dim"] % (len(labels) + 1), None)
    return Effect((tuple(labels),))


@rule("squeeze", "squeeze.dim", "squeeze.dims", "squeeze_.dim")
def squeeze(call: Call) -> Effect:
    """Dims of size 1 go; another one must not come down to that."""
    shape, labels = list(call.args["self"].shape), call.labels("self")
    if not labels:
        return Effect(((),))
    chosen = call.args.get("dim", range(len(labels)))
    dims = {dim % len(labels) for dim in ([chosen] if isinstance(chosen, int) else chosen)}
    if len(shape) < len(labels):  # squeezed in place already
        shape.insert(min(dims), 1)
    gone = {dim for dim in dims if shape[dim] == 1}
    for dim in dims - gone:
        call.pin_first(labels[dim], 2, "a last position alone would be squeezed away")
    return Effect((tuple(own for d, own in enumerate(labels) if d not in gone),))


def _stretched(call: Call) -> tuple[Labels, tuple[int, ...]]:
    """Labels and shape of an argument with the leading dims that its output has more."""
    source, more = call.args["self"], call.outputs[0].dim() - call.args["self"].dim()
    return (None,) * more + call.labels("self"), (1,) * more + tuple(source.shape)


@rule("expand")
def expand(call: Call) -> Effect:
    """Stretched dims hold copies: they take the labels of whatever they meet."""
    out = call.outputs[0]
    own, shape = _stretched(call)
    name = call.inner_name("expand")
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
    given = call.given_to("repeat_interleave")
    times = None if given is None else expression_of(given.argument(1, "repeats"))
    stretched = [label for label in copies if label is not None]
    return () if times is None else tuple((times, len(label), label) for label in stretched)


def _times_written(call: Call, ndim: int) -> list[Any] | None:
    """How often each dim is repeated, as the forward wrote it; ``tile`` may leave out the first."""
    given = call.given_to("repeat", "tile")
    for count in range(ndim, 0, -1):
        written = None if given is None else given.sizes(count)
        if written is not None:
            return [1] * (ndim - count) + written
    return None


@rule("repeat")
def repeat(call: Call) -> Effect:
    """Copies laid end to end: every copy keeps the same positions.

    There are as many copies as the forward writes; where it writes a width, they follow it.
    """
    ndim = call.outputs[0].dim()
    own, shape = _stretched(call)
    repeats = call.args["repeats"]
    written = _times_written(call, ndim)
    name = call.inner_name("repeat")
    copies: list[Label | None] = [None] * ndim
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


@rule("flip")
def flip(call: Call) -> Effect:
    """A reversed dim has a reversed label."""
    labels = list(call.labels("self"))
    for dim in call.args["dims"]:
        label = labels[dim]
        labels[dim] = None if label is None else label[::-1]
    return Effect((tuple(labels),))


@rule("diagonal", "trace")
def diagonal(call: Call) -> Effect:
    """Positions that two dims share, so the two go together; the new dim comes last."""
    labels, shape = call.labels("self"), call.args["self"].shape
    one, other = (
        call.args.get(name, dim) % len(labels) for dim, name in enumerate(("dim1", "dim2"))
    )
    joined = None
    if shape[one] == shape[other] and not call.args.get("offset"):
        joined = call.unify(labels[one], labels[other], "a diagonal of the two dims")
    else:
        call.keep(labels, (one, other), "a diagonal that is not the main one of a square")
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
    for dim in sorted(call.args[name] % count for name in ("dim1", "dim2")):
        labels.insert(dim, last)
    return Effect((tuple(labels),))


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(call: Call) -> Effect:
    """C·r² channels become r × r pixels of C channels, or back."""
    labels = call.labels("self")
    call.keep(labels, (-2, -1), "space is shuffled with channels")
    channels = call.args["self"].shape[-3]
    if call.name == "pixel_shuffle":
        square = call.args["upscale_factor"] ** 2
        sizes = (channels // square, square)
        together = "the r × r channels of one pixel block stay together"
        out = call.split(labels[-3], sizes, together, pinned=1)
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
    return call.give_up("addressed by strides")


@rule("resize_")
def resize(call: Call) -> Effect:
    """Passes where the size is as before, as where an observer takes down what it has seen."""
    labels, out = call.labels("self"), call.outputs[0]
    fits = len(labels) == out.dim() and all(
        label is None or len(label) == size for label, size in zip(labels, out.shape, strict=True)
    )
    if not fits:
        labels = call.give_up("memory is given another size").outputs[0]
    return Effect((labels,), sizes={"size": list(zip(out.shape, labels, strict=True))})


@rule("view_as_real", "view_as_complex")
def complex_parts(call: Call) -> Effect:
    """A last dim of two, the real and the imaginary part, comes or goes."""
    labels = call.labels("self")
    if call.name == "view_as_real":
        return Effect(((*labels, None),))
    call.pin(labels[-1], "real and imaginary part")
    return Effect((labels[:-1],))
