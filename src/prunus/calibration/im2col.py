"""What a product reads at once: a vector, or the window of a convolution as one column.

A convolution is a matrix product over the columns of its input (im2col).  Columns are ordered by
tap, then by channel, so that the columns of one tap lie side by side; of the positions of an image
some are drawn, evenly spread and by the number of the image alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_GOLDEN = (math.sqrt(5) - 1) / 2
_CHUNK = 1 << 24
"""Elements of features that are made at a time: 64 MiB in float32."""


@dataclass(frozen=True)
class Window:
    """How a convolution reads its input; without a kernel, how a matrix product does.

    >>> Window((3, 3), (1, 1), (1, 1), (1, 1)).taps
    9
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False

    @property
    def taps(self) -> int:
        """Positions that are read at once."""
        return math.prod(self.kernel)

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of what comes out of an input of this spatial size.

        >>> Window((3,), (2,), (1,), (1,)).output_size([8])
        (4,)
        >>> Window((3,), (2,), (1,), (1,), (1,), transposed=True).output_size([4])
        (8,)
        """
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        if self.transposed:
            return tuple(
                (n - 1) * s - 2 * p + span + more + 1
                for n, s, p, span, more in zip(
                    size, self.stride, self.padding, spans, self.output_padding, strict=True
                )
            )
        return tuple(
            (n + 2 * p - span - 1) // s + 1
            for n, s, p, span in zip(size, self.stride, self.padding, spans, strict=True)
        )


def window_of(arguments: Mapping[str, Any], weight: Sequence[int]) -> Window:
    """The window of a recorded or running product, by its arguments and its weight's shape."""
    if "groups" not in arguments:
        return Window()
    kernel = tuple(weight[2:])

    def spread(name: str) -> tuple[int, ...]:
        given = tuple(arguments[name])
        return given * len(kernel) if len(given) == 1 else given

    return Window(
        kernel,
        spread("stride"),
        spread("padding"),
        spread("dilation"),
        spread("output_padding"),
        int(arguments["groups"]),
        bool(arguments["transposed"]),
    )


def sample_positions(outputs: int, images: Tensor, limit: int) -> Tensor:
    """Positions of every image, ascending: shape ``(len(images), min(outputs, limit))``.

    Evenly spaced, with an offset that moves by the golden ratio from image to image, so that over
    many images all positions count alike.  What is drawn depends on the image's number alone.

    >>> sample_positions(9, torch.tensor([0, 1]), 3)
    tensor([[1, 4, 7],
            [0, 3, 6]])
    """
    if outputs <= limit:
        return torch.arange(outputs, device=images.device).expand(len(images), outputs)
    offset = ((images.double() + 1) * _GOLDEN) % 1
    steps = torch.arange(limit, dtype=torch.float64, device=images.device)
    return ((steps + offset[:, None]) * (outputs / limit)).long().clamp_max(outputs - 1)


def find_sources(window: Window, size: Sequence[int], at: Tensor) -> Tensor:
    """Flat input positions that every tap reads at output positions; −1 in the padding.

    Parameters
    ----------
    size
        Spatial size of the input.
    at
        Output positions, flat, shape ``(p,)``.

    Returns
    -------
    Tensor
        Shape ``(p, taps)``.

    Examples
    --------
    >>> find_sources(Window((3,), (1,), (1,), (1,)), [4], torch.tensor([0, 2]))
    tensor([[-1,  0,  1],
            [ 1,  2,  3]])
    """
    places = torch.unravel_index(at, window.output_size(size))
    flat = at.new_zeros(len(at), 1)
    inside = torch.ones_like(flat, dtype=torch.bool)
    for dim, place in enumerate(places):
        reach = torch.arange(window.kernel[dim], device=at.device) * window.dilation[dim]
        stride, padding = window.stride[dim], window.padding[dim]
        if window.transposed:
            shifted = place[:, None] + padding - reach
            source, hit = shifted // stride, shifted % stride == 0
        else:
            source = place[:, None] * stride - padding + reach
            hit = torch.ones_like(source, dtype=torch.bool)
        hit = hit & (source >= 0) & (source < size[dim])
        flat = (flat[:, :, None] * size[dim] + source[:, None, :]).flatten(1)
        inside = (inside[:, :, None] & hit[:, None, :]).flatten(1)
    return torch.where(inside, flat, -1)


def columns_of(images: Tensor, window: Window, *, first: int, limit: int) -> Iterator[Tensor]:
    """Columns that a convolution reads, part by part, shape ``(groups, rows, taps · channels)``.

    Parameters
    ----------
    images
        Shape ``(batch, channels, *size)``.
    first
        The number of the first image, for :func:`sample_positions`.
    limit
        Positions of an image at most.

    Notes
    -----
    Channels are those of a group.  ``columns @ matrix_of(weight).mT`` is what the convolution
    gives at the sampled positions, without its bias.
    """
    size = images.shape[2:]
    outputs = math.prod(window.output_size(size))
    per_image = max(1, min(outputs, limit) * window.taps * images.shape[1])
    for part in images.split(max(1, _CHUNK // per_image)):
        numbers = torch.arange(first, first + len(part), device=images.device)
        first += len(part)
        at = sample_positions(outputs, numbers, limit)
        source = find_sources(window, size, at.flatten()).view(len(part), -1)
        table = part.new_zeros(part[:, 0].numel() + 1, part.shape[1])
        table[:-1] = part.movedim(1, -1).flatten(0, -2)
        start = torch.arange(len(part), device=images.device)[:, None] * math.prod(size)
        source = torch.where(source < 0, len(table) - 1, source + start)
        picked = table.index_select(0, source.flatten())
        picked = picked.view(at.numel(), window.taps, window.groups, -1)
        yield picked.permute(2, 0, 1, 3).flatten(2)


def matrix_of(weight: Tensor, window: Window, dim: int = 1) -> Tensor:
    """A weight as a matrix for every group, shape ``(groups, outputs, taps · channels)``.

    ``dim`` is the one of a plain matrix that is summed over; convolutions have theirs.
    """
    if not window.kernel:
        return weight.movedim(dim, -1)[None]
    blocks: Tensor = weight.flatten(2).unflatten(0, (window.groups, -1))
    if window.transposed:  # (groups, channels, outputs, taps)
        return blocks.permute(0, 2, 3, 1).flatten(2)
    return blocks.transpose(2, 3).flatten(2)  # from (groups, outputs, channels, taps)


def weight_of(matrix: Tensor, window: Window, shape: Sequence[int], dim: int = 1) -> Tensor:
    """The weight of that shape of which :func:`matrix_of` makes the matrix."""
    if not window.kernel:
        return matrix[0].movedim(-1, dim)
    blocks: Tensor = matrix.unflatten(2, (window.taps, -1))  # (groups, outputs, taps, channels)
    order = (0, 3, 1, 2) if window.transposed else (0, 1, 3, 2)
    return blocks.permute(order).flatten(0, 1).reshape(tuple(shape))
