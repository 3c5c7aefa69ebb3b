"""Ridge least squares: what is removed, said again by what stays.

With features ``h``, of which S stay and P go, and ``y = W h + b``: ``h_P`` is predicted as
``B h_S + c`` and folded into the weights, ``W' = W_S + W_P B`` and ``b' = b + W_P c``.  All that
is needed is ``Δ = W_P B`` of shape (outputs, kept), so that B is never made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ATTEMPTS = 8
"""Times that the ridge is raised tenfold before the eigenvalues are taken."""


@dataclass(frozen=True, eq=False)
class Folded:
    """Weights that stand for removed features, and how much of the outputs they miss.

    Attributes
    ----------
    change
        Δ, what is added to the kept columns: float64 of shape ``(outputs, kept)``.
    shift
        What is added to the bias, shape ``(outputs,)``.
    error
        E (Δ h_S + shift − W_P h_P)² of every output, shape ``(outputs,)``.
    ridge
        λ, as it was used.
    """

    change: Tensor
    shift: Tensor
    error: Tensor
    ridge: float


def ridge_of(variance: Tensor, share: float, rows: int, columns: int) -> float:
    """λ = share · mean(variance); with fewer rows than columns the share is at least
    ``columns / (10 · rows)``, since so few rows are fitted by chance.

    >>> ridge_of(torch.tensor([1.0, 3.0]), 1e-3, rows=100, columns=2)
    0.002
    >>> ridge_of(torch.tensor([1.0, 3.0]), 1e-3, rows=1, columns=2)
    0.4
    """
    if rows < columns:
        share = max(share, columns / (10 * rows))
    return share * float(variance.mean())


def solve_ridge(matrix: Tensor, right: Tensor, ridge: float) -> tuple[Tensor, float]:
    """``right (matrix + λI)⁻¹`` for a symmetric matrix, and the λ that it took.

    Where Cholesky's factorisation fails, λ grows tenfold, and at last the eigenvalues below λ are
    taken for λ.  A matrix of zeros gives zeros: nothing can be learned from what is constant.

    Parameters
    ----------
    matrix, right
        Shapes ``(n, n)`` and ``(m, n)``.
    """
    scale = float(matrix.diagonal().abs().max()) if len(matrix) else 0.0
    if scale == 0:
        return torch.zeros_like(right), ridge
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    ridge = max(ridge, scale * torch.finfo(matrix.dtype).eps)
    for _ in range(ATTEMPTS):
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * identity)
        if not bool(failed):
            return torch.cholesky_solve(right.mT, factor).mT, ridge
        ridge *= 10
    values, vectors = torch.linalg.eigh(matrix)
    return (right @ vectors) / (values + ridge).clamp_min(ridge) @ vectors.mT, ridge


def fold(
    weight: Tensor,
    kept: Tensor,
    moment: Tensor,
    mean: Tensor | None,
    *,
    share: float,
    rows: int,
) -> Folded:
    """Fold removed columns into kept ones: the ridge least squares of the outputs.

    Parameters
    ----------
    weight
        Shape ``(outputs, columns)``.
    kept
        Indices of the columns that stay.
    moment, mean
        With a mean: the covariance of the features, shape ``(columns, columns)``, and the bias
        takes up what is constant.  Without: ``E h hᵀ``, and there is no bias to change.
    share
        λ is this share of the mean of the diagonal over the kept columns.
    rows
        How many feature vectors the moments are of.

    Notes
    -----
    The error of a row ``w`` of the weight is ``w_P C_PP w_Pᵀ − 2 δ C_SP w_Pᵀ + δ C_SS δᵀ`` with its
    row δ of Δ, whatever Δ is; for the solution of the ridge loss that is
    ``w_P (C_PP − B C_SP − λ B Bᵀ) w_Pᵀ``.
    """
    gone = removed_of(kept, weight.shape[1])
    there, away = weight[:, kept], weight[:, gone]
    cross = away @ moment[gone][:, kept]
    inner = moment[kept][:, kept]
    ridge = ridge_of(inner.diagonal(), share, rows, len(kept)) if len(kept) else 0.0
    change, ridge = solve_ridge(inner, cross, ridge)
    whole = ((away @ moment[gone][:, gone]) * away).sum(1)
    error = whole - 2 * (change * cross).sum(1) + ((change @ inner) * change).sum(1)
    shift = torch.zeros_like(there[:, 0] if there.shape[1] else away[:, 0])
    if mean is not None:
        shift = away @ mean[gone] - change @ mean[kept]
    return Folded(change, shift, error.clamp_min(0), ridge)


def refold(
    weight: Tensor,
    kept: Tensor,
    moments: tuple[Tensor, Tensor, Tensor],
    means: tuple[Tensor, Tensor] | None,
    *,
    share: float,
    rows: int,
) -> Folded:
    """Fit kept columns to what the dense weight says of dense features, on other features.

    Parameters
    ----------
    weight, kept, share, rows
        As for :func:`fold`.
    moments
        Of the dense features h and of those g that there are now: E h hᵀ, E h gᵀ and E g gᵀ, shapes
        ``(columns, columns)``, ``(columns, kept)`` and ``(kept, kept)``.
    means
        E h and E g: moments are then around these, and the bias takes up what is constant.

    Notes
    -----
    ``W' = W_S + (W C_hg − W_S C_gg)(C_gg + λI)⁻¹``, so that λ draws to the dense weights and not to
    zero: where g is h without what went, it is what :func:`fold` gives.  The error is
    ``E (W' g + shift − W h)²``.
    """
    _, cross, inner = moments
    wanted = weight @ cross
    ridge = ridge_of(inner.diagonal(), share, rows, len(kept)) if len(kept) else 0.0
    change, ridge = solve_ridge(inner, wanted - weight[:, kept] @ inner, ridge)
    new = weight[:, kept] + change
    shift = torch.zeros_like(weight[:, 0])
    if means is not None:
        shift = weight @ means[0] - new @ means[1]
    return Folded(change, shift, error_between(weight, new, moments), ridge)


def error_between(weight: Tensor, new: Tensor, moments: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """E (V g − W h)² of every output, for ``weight`` W and ``new`` V; moments of :func:`refold`."""
    dense, cross, inner = moments
    own = ((weight @ dense) * weight).sum(1)
    error = own - 2 * ((weight @ cross) * new).sum(1) + ((new @ inner) * new).sum(1)
    return error.clamp_min(0)


def shift_only(weight: Tensor, kept: Tensor, covariance: Tensor, mean: Tensor) -> Folded:
    """Let the bias take up the mean of what goes (An et al., 2024); weights stay as they are."""
    gone = removed_of(kept, weight.shape[1])
    error = error_of_cut(weight, kept, covariance)
    return Folded(torch.zeros_like(weight[:, kept]), weight[:, gone] @ mean[gone], error, 0.0)


def error_of_cut(weight: Tensor, kept: Tensor, second: Tensor) -> Tensor:
    """E (W_P h_P)² of every output, with ``second = E h hᵀ``: what a cut alone misses.

    With the covariance in its place it is what is missed beside a constant.
    """
    gone = removed_of(kept, weight.shape[1])
    away = weight[:, gone]
    return ((away @ second[gone][:, gone]) * away).sum(1).clamp_min(0)


def removed_of(kept: Tensor, columns: int) -> Tensor:
    """The other indices, ascending.

    >>> removed_of(torch.tensor([0, 2]), 4)
    tensor([1, 3])
    """
    gone = torch.ones(columns, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    return gone.nonzero()[:, 0]
