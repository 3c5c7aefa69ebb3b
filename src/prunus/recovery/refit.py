"""The repair of one consumer: from moments and kept positions to new weights and their error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.calibration.im2col import matrix_of, weight_of
from prunus.calibration.moments import CrossMoments, OwnMoments
from prunus.calibration.sites import Site
from prunus.graph.axis import Mask, kept_positions
from prunus.recovery.consumers import Consumer, Place
from prunus.recovery.least_squares import Method, fold


@dataclass(frozen=True)
class Options:
    """What :func:`prunus.recovery.compensate` was called with."""

    method: Method = "least_squares"
    ridge: float = 1e-3
    sequential: bool = False
    new_biases: bool = True
    positions: int = 64
    memory_limit: int = 8 << 30


@dataclass(frozen=True)
class Repair:
    """What compensation did to one weight; errors are sums over the outputs that stay.

    They are errors on dense inputs; where it was sequential, on what the cut and repaired layers
    before it give, against the dense outputs on dense inputs.

    Attributes
    ----------
    tensor
        Name of the weight; of two, for a product of queries and keys.
    kept, columns
        Columns (channels × taps) that stay, of how many.
    samples
        Feature vectors that the solution is fitted to.
    ridge
        λ in the units of the features' squares; 0 where no weights were fitted.
    spread
        Variance of the dense outputs.
    cut, shifted, left
        Mean squared error of the outputs right after the cut, with a bias alone, and now.
    place
        What took up the constant part; empty if nothing could.
    exact
        Whether the errors are those on the samples; else products between taps were left out.
    """

    tensor: str
    kept: int
    columns: int
    samples: int
    ridge: float
    spread: float
    cut: float
    shifted: float
    left: float
    place: Place
    exact: bool


@dataclass(frozen=True, eq=False)
class Repaired:
    """New values of a weight, and what to add to its outputs' constant; float64."""

    weight: Tensor
    shift: Tensor
    report: Repair


def refit(
    consumer: Consumer,
    weight: Tensor,
    rows: Tensor,
    sums: OwnMoments | CrossMoments,
    *,
    share: float,
    method: Method = "least_squares",
) -> Repaired:
    """Fit what stays of a weight to what all of it says, group by group of a convolution.

    Parameters
    ----------
    weight
        The dense weight, as it is.
    rows
        Whether each output stays, shape ``(outputs,)``: errors are summed over those.
    sums
        Of what it reads, in the dense model and now.
    share, method
        See :func:`~prunus.recovery.least_squares.fold`.

    Returns
    -------
    Repaired
        The weight has zeros in the columns that go.
    """
    window = consumer.site.window
    matrix = matrix_of(weight.detach().to(sums.like), window, consumer.dim)
    groups, outputs, columns = matrix.shape
    there = rows.to(matrix.device).view(groups, outputs)
    new, shift = torch.zeros_like(matrix), matrix.new_zeros(groups, outputs)
    errors = torch.zeros(4, dtype=torch.float64)
    ridge, kept = 0.0, 0
    fixed = not consumer.place
    for group in there.any(1).nonzero()[:, 0].tolist():
        for part in sums.pairings(group):
            own = matrix[group][:, part.columns]
            found = fold(own, part, fixed=fixed, share=share, rows=sums.count, method=method)
            new[group][:, part.columns[part.kept]] = found.weight
            shift[group] += found.shift
            ridge, kept = max(ridge, found.ridge), kept + len(part.kept)
            each = torch.stack([found.spread, found.cut, found.shifted, found.error])
            errors += each[:, there[group]].sum(1).cpu()
    spread, cut, shifted, left = errors.tolist()
    report = Repair(
        consumer.tensor,
        kept,
        groups * columns,
        sums.count,
        ridge,
        spread,
        cut,
        shifted,
        left,
        consumer.place,
        sums.exact,
    )
    return Repaired(weight_of(new, window, weight.shape, consumer.dim), shift.flatten(), report)


def stay_of(site: Site, kept: Mask) -> Tensor:
    """Which channels of a site stay, shape ``(groups, channels of a group)``."""
    stay = torch.zeros(len(site.label), dtype=torch.bool)
    stay[kept_positions(site.label, kept)] = True
    return stay.view(site.window.groups, -1)


def loses(site: Site, kept: Mask) -> bool:
    """Whether anything goes of what is read there."""
    return len(kept_positions(site.label, kept)) < len(site.label)


def outputs_that_stay(
    consumer: Consumer, shape: tuple[int, ...], keep: Mapping[int, Tensor]
) -> Tensor:
    """Whether each output of a weight of that shape stays, shape ``(outputs,)``.

    ``keep`` has the positions that stay of the weight's dims that lose any.
    """
    window = consumer.site.window
    dim = 1 - consumer.dim  # of the outputs: of a group, where the convolution is transposed
    groups = window.groups if window.transposed else 1
    there = torch.ones(groups, shape[dim], dtype=torch.bool)
    if dim in keep:
        there[:] = False
        there[:, keep[dim]] = True
    if groups > 1 and consumer.dim in keep:  # a group that goes takes its outputs along
        alive = torch.zeros(shape[consumer.dim], dtype=torch.bool)
        alive[keep[consumer.dim]] = True
        there &= alive.view(groups, -1).any(1, keepdim=True)
    return there.flatten()


def shift_constant(constant: Tensor, consumer: Consumer, shift: Tensor) -> None:
    """Add what the outputs lack on the average to their bias, or take it from a norm's mean."""
    sign = -1 if consumer.place == "running mean" else 1
    constant.copy_(constant.double() + sign * shift.to(constant.device))
