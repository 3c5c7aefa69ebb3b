"""Ridge least squares: what a whole weight says of dense features, said by the features that stay.

With h what a weight W reads in the dense model and g what it reads now (h without the columns that
go, or behind layers that were cut and repaired already), S the kept columns and C covariances,

    W' = W_S + (W C_hg − W_S C_gg)(C_gg + λI)⁻¹,    b' = b + W E h − W' E g

so that λ draws to the dense weights and not to zero.  Where nothing takes up a constant, C are
second moments and b' = b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunus.calibration.moments import Pairing

ATTEMPTS = 8
"""Times that the ridge is raised tenfold before the eigenvalues are taken."""

Method = Literal["least_squares", "bias"]


@dataclass(frozen=True, eq=False)
class Folded:
    """The kept columns of a weight, and how much of every output they miss; float64.

    Attributes
    ----------
    weight
        W', shape ``(outputs, kept)``.
    shift
        What is added to the bias, shape ``(outputs,)``.
    spread
        Variance of the dense outputs.
    cut, shifted, error
        Mean squared errors: right after the cut, with a bias alone, and now.
    ridge
        λ, as it was used; 0 where no weights were fitted.
    """

    weight: Tensor
    shift: Tensor
    spread: Tensor
    cut: Tensor
    shifted: Tensor
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
    return share * float(variance.mean()) if columns else 0.0


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
    weight: Tensor, part: Pairing, *, fixed: bool, share: float, rows: int, method: Method
) -> Folded:
    """Fit what stays of a weight to what all of it says.

    Parameters
    ----------
    weight
        W, shape ``(outputs, columns)``.
    part
        Moments of these columns.
    fixed
        Whether nothing takes up a constant.
    share
        See :func:`ridge_of`.
    rows
        How many feature vectors the moments are of.
    method
        With ``"bias"`` the bias alone takes up the mean of what goes (An et al., 2024).
    """
    stayed, inner = weight[:, part.kept], part.inner
    wanted = weight @ part.cross
    spread = ((weight @ part.dense) * weight).sum(1)
    before, now = weight @ part.means[0], part.means[1]

    def missed(new: Tensor) -> Tensor:
        """Variance of ``new g − W h`` of every output."""
        error = spread - 2 * (wanted * new).sum(1) + ((new @ inner) * new).sum(1)
        return error.clamp_min(0)

    new, ridge = stayed, 0.0
    if method == "least_squares":
        right, matrix = wanted, inner
        if fixed:  # around zero
            right = wanted + before[:, None] * now
            matrix = inner + now[:, None] * now
        ridge = ridge_of(matrix.diagonal(), share, rows, len(part.kept))
        change, ridge = solve_ridge(matrix, right - stayed @ matrix, ridge)
        new = stayed + change
    shifted, left = missed(stayed), missed(new)
    cut = shifted + (before - stayed @ now).square()
    off = before - new @ now
    if fixed:
        return Folded(new, torch.zeros_like(off), spread, cut, shifted, left + off.square(), ridge)
    return Folded(new, off, spread, cut, shifted, left, ridge)
