"""The repair of one consumer: from moments and kept positions to new weights and their error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunus.calibration.im2col import matrix_of, weight_of
from prunus.calibration.second_moments import Moments
from prunus.recovery.consumers import Consumer, Place
from prunus.recovery.least_squares import Folded, error_of_cut, fold, shift_only

Method = Literal["least_squares", "bias"]


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


def repair(
    consumer: Consumer,
    weight: Tensor,
    channels: Tensor,
    rows: Tensor,
    *,
    method: Method,
    share: float,
) -> Repaired:
    """Fold what goes into what stays, group by group of a convolution.

    Parameters
    ----------
    weight
        The dense weight, as it is.
    channels
        Whether each position of the input stays, shape ``(n,)``.
    rows
        Whether each output stays, shape ``(outputs,)``: errors are summed over those.
    share
        See :func:`~prunus.recovery.least_squares.ridge_of`.

    Returns
    -------
    Repaired
        The weight has zeros in the columns that go.
    """
    window, moments = consumer.site.window, consumer.site.moments
    if moments is None:
        raise AssertionError(f"{consumer.tensor} has no moments")
    matrix = matrix_of(weight.detach().to(moments.total), window, consumer.dim)
    groups, outputs, columns = matrix.shape
    stay = channels.to(matrix.device).view(groups, 1, -1).expand(-1, window.taps, -1).flatten(1)
    there = rows.to(matrix.device).view(groups, outputs)
    new, shift = torch.zeros_like(matrix), matrix.new_zeros(groups, outputs)
    sums = torch.zeros(4, dtype=torch.float64)
    ridge = 0.0
    fixed = not consumer.place
    for group in range(groups):
        if not there[group].any():
            continue
        for part in _parts(moments, group):
            own, kept = matrix[group][:, part.columns], stay[group][part.columns].nonzero()[:, 0]
            folded = _fold(own, kept, part, fixed=fixed, method=method, share=share)
            new[group][:, part.columns[kept]] = own[:, kept] + folded.change
            shift[group] += folded.shift
            ridge = max(ridge, folded.ridge)
            nothing = kept[:0]
            errors = (
                error_of_cut(own, nothing, part.covariance),
                error_of_cut(own, kept, part.second),
                error_of_cut(own, kept, part.covariance),
                folded.error,
            )
            sums += torch.stack([error[there[group]].sum().cpu() for error in errors])
    spread, cut, shifted, left = sums.tolist()
    report = Repair(
        consumer.tensor,
        int(stay.sum()),
        groups * columns,
        moments.count,
        ridge,
        spread,
        cut,
        shifted,
        left,
        consumer.place,
        moments.blocks == 1,
    )
    return Repaired(weight_of(new, window, weight.shape, consumer.dim), shift.flatten(), report)


@dataclass(frozen=True, eq=False)
class _Part:
    """Columns of a group whose products were summed up among themselves."""

    columns: Tensor
    covariance: Tensor
    second: Tensor
    mean: Tensor
    rows: int


def _parts(moments: Moments, group: int) -> list[_Part]:
    columns = torch.arange(moments.columns, device=moments.total.device)
    covariance, second = moments.covariance()[group], moments.second()[group]
    return [
        _Part(own, covariance[block], second[block], moments.mean[group][own], moments.count)
        for block, own in enumerate(columns.view(moments.blocks, -1))
    ]


def _fold(
    weight: Tensor, kept: Tensor, part: _Part, *, fixed: bool, method: Method, share: float
) -> Folded:
    """One solution; where nothing takes up a constant (``fixed``), without one."""
    if method == "bias" and not fixed:
        return shift_only(weight, kept, part.covariance, part.mean)
    if method == "bias":
        error = error_of_cut(weight, kept, part.second)
        return Folded(torch.zeros_like(weight[:, kept]), torch.zeros_like(error), error, 0.0)
    moment, mean = (part.second, None) if fixed else (part.covariance, part.mean)
    return fold(weight, kept, moment, mean, share=share, rows=part.rows)


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
