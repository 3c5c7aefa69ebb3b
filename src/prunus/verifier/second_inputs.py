"""Inputs of another shape than the example's: fewer or more samples, another size or length.

Nothing here knows what a model takes.  What an input may be is read off the example: dims that
tensors share change together, and whoever asks runs the model to see whether it takes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from prunus.tracer.inputs import main_tensor

SMALL = 64
"""Images up to this side grow rather than shrink: much smaller ones hold too little."""

SHORT = 64
"""Sequences up to this length become more than twice as long."""

MULTIPLE = 32
"""Sides of images stay multiples of this where they are."""


@dataclass(frozen=True)
class Inputs:
    """A call's arguments, and what of their shape is another than the example's."""

    what: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        tensors = [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        shapes = ("×".join(map(str, tensor.shape)) or "scalar" for tensor in tensors)
        return f"{self.what}: {', '.join(shapes)}"


_Change = tuple[str, Callable[[Tensor], Tensor]]
"""What of the shape changes, and how a tensor does."""


def other_inputs(
    args: tuple[Any, ...], kwargs: dict[str, Any], lengths: Sequence[int] = ()
) -> Iterator[Inputs]:
    """Candidates, the best first: samples and size at once, then either alone.

    Parameters
    ----------
    lengths
        Lengths of sequences to try first: those at which a model does something else.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not any(tensor.dim() for tensor in tensors):
        return
    listed = any(_is_list_of_images(value) for value in args)
    batch, sizes = _other_batch(tensors), [*_other_sizes(tensors, lengths, listed)]

    def made(size: _Change | None, samples: bool) -> Inputs:
        changes = [one for one in (size, None if listed or not samples else batch) if one]

        def change(leaf: Any) -> Any:
            for _, apply in changes if isinstance(leaf, Tensor) else ():
                leaf = apply(leaf)
            return leaf

        said = [what for what, _ in changes]
        given, named = tree_map(change, args), tree_map(change, kwargs)
        if listed and samples:
            given = tuple(map(_other_list, given))
            said.append("another number of images")
        return Inputs(", ".join(said), given, named)

    yield from (made(size, True) for size in sizes)
    yield made(None, True)
    yield from (made(size, False) for size in sizes)


def _is_list_of_images(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, Tensor) and v.dim() == 3 for v in value)


def _other_list(value: Any) -> Any:
    if not _is_list_of_images(value):
        return value
    return value[:1] if len(value) > 1 else value * 2


def _other_batch(tensors: Sequence[Tensor]) -> _Change:
    """One sample instead of several, two instead of one.

    Two or three where the first dim may also be a length, as in recurrent modules: a sequence of
    one step reads no recurrent weight.
    """
    main = main_tensor(tensors)
    count, tokens = main.shape[0], main.dim() == 2 and not main.is_floating_point()
    after = 1 if count > 1 else 2
    if count > 1 and (main.dim() == 3 or tokens):
        after = 2 if count > 2 else 3

    def apply(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != count:
            return tensor
        other = extended(tensor, 0, after)
        if count == 1 and tensor.is_floating_point() and tensor.dim() > 1:
            other[1] = tensor[0].roll(1, -1)
        return other

    return f"batch {after}", apply


def _other_sizes(
    tensors: Sequence[Tensor], lengths: Sequence[int], listed: bool
) -> Iterator[_Change]:
    images = [t for t in tensors if t.dim() > 3 and t.is_floating_point()]
    for image in (images or (tensors if listed else []))[:1]:
        yield from _resolutions((int(image.shape[-2]), int(image.shape[-1])))
    for sequence, dim in () if listed else _sequences(tensors):
        yield from _lengths(sequence, dim, lengths)


def _resolutions(sides: tuple[int, int]) -> Iterator[_Change]:
    for factor in (0.5, 1.5) if min(sides) > SMALL else (1.5, 0.5):
        after = (_scaled(sides[0], factor), _scaled(sides[1], factor))
        if after != sides and min(after) > 0:
            yield f"resolution {after[0]}×{after[1]}", _resized(sides, after)


def _lengths(sequence: Tensor, dim: int, lengths: Sequence[int]) -> Iterator[_Change]:
    length = int(sequence.shape[dim])
    longer = 2 * length + 1 if length <= SHORT else length + length // 4 + 1
    beyond = [max(n, longer) for n in sorted(lengths) if n > length]
    for other in dict.fromkeys([*beyond, longer, (length + 1) // 2]):
        if other != length and other > 1:
            yield f"length {other}", _relengthed(sequence, dim, other)


def _sequences(tensors: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """What may be sequences, with the dim that is their length."""
    kinds: dict[tuple[int, bool], Tensor] = {}  # the first of each
    for tensor in tensors:
        kinds.setdefault((tensor.dim(), tensor.is_floating_point()), tensor)
    deepest = max(dim for dim, _ in kinds)
    if (2, False) in kinds:
        return [(kinds[2, False], 1)]
    if (3, True) in kinds and deepest == 3:
        return [(kinds[3, True], dim) for dim in (1, 2)]
    return [(kinds[2, True], 1)] if (2, True) in kinds and deepest == 2 else []


def _scaled(side: int, factor: float) -> int:
    step = next(m for m in (MULTIPLE, 16, 8, 4, 2, 1) if side % m == 0)
    after = max(round(side * factor / step), 1) * step
    return after if after != side else side + step


def _resized(sides: tuple[int, int], after: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    def apply(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2 or tuple(tensor.shape[-2:]) != sides:
            return tensor
        return extended(extended(tensor, -2, after[0]), -1, after[1])

    return apply


def _relengthed(sequence: Tensor, dim: int, after: int) -> Callable[[Tensor], Tensor]:
    """Every dim of that length, in tensors of the same make only the same dim."""
    length, batch = sequence.shape[dim], sequence.shape[0]

    def apply(tensor: Tensor) -> Tensor:
        alike = tensor.dim() == sequence.dim() and (
            tensor.is_floating_point() and sequence.is_floating_point()
        )
        square = tensor.dim() == 2 and tuple(tensor.shape) == (length, length) and length != batch
        first = 0 if square else 1
        for own in (dim,) if alike and not square else range(first, tensor.dim()):
            if own < tensor.dim() and tensor.shape[own] == length:
                tensor = extended(tensor, own, after)
        if tensor.dim() == 1 and not tensor.is_floating_point() and after < length:
            tensor = tensor.clamp(max=after) if tensor.dtype != torch.bool else tensor
        return tensor

    return apply


def extended(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with another size of a dim: cut off, or continued from its beginning.

    Counting goes on counting.

    >>> extended(torch.tensor([[7, 3, 5]]), 1, 5).tolist(), extended(torch.arange(3), 0, 5).tolist()
    ([[7, 3, 5, 7, 3]], [0, 1, 2, 3, 4])
    """
    before = tensor.shape[dim]
    if not before:
        return tensor.new_zeros([*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]])
    if size <= before:
        return tensor.narrow(dim, 0, size)
    integers = not tensor.is_floating_point() and tensor.dtype != torch.bool
    if integers and before > 1 and bool((tensor.diff(dim=dim) == 1).all()):
        steps = torch.arange(size, device=tensor.device, dtype=tensor.dtype)
        shape = [1] * tensor.dim()
        shape[dim] = size
        return tensor.narrow(dim, 0, 1) + steps.view(shape)
    places = torch.arange(size, device=tensor.device) % before
    return tensor.index_select(dim, places)
