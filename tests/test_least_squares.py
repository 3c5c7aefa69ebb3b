"""Moments and the ridge fit against numpy and lstsq."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunus.calibration.moments import Moments, Pairing, fit_memory
from prunus.errors import DataError
from prunus.recovery.least_squares import fold, ridge_of, solve_ridge

CLOSE: Any = {"rtol": 1e-6, "atol": 1e-8}


def noisy(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rows_of(count: int, columns: int, seed: int = 0) -> Tensor:
    mixing = noisy((columns, columns), seed + 1)
    return noisy((count, columns), seed) @ mixing + 30


@pytest.mark.parametrize("blocks", [1, 3, 6])
def test_moments_are_those_of_numpy(blocks: int) -> None:
    rows = torch.stack([rows_of(50, 6), rows_of(50, 6, 5)])
    found = Moments(2, 6, blocks)
    for part in rows.split(17, 1):
        found.add(part)
    assert found.count == 50
    for group in range(2):
        whole = np.cov(rows[group].numpy().T, bias=True)
        own = [whole[i : i + 6 // blocks, i : i + 6 // blocks]
               for i in range(0, 6, 6 // blocks)]  # fmt: skip
        np.testing.assert_allclose(found.covariance()[group], np.stack(own), rtol=1e-9)
        np.testing.assert_allclose(found.mean[group], rows[group].mean(0), rtol=1e-12)
        squares = (rows[group].T @ rows[group] / 50).diagonal()
        diagonal = found.second()[group].diagonal(dim1=-2, dim2=-1).flatten()
        np.testing.assert_allclose(diagonal, squares, rtol=1e-12)


def test_a_large_mean_costs_no_digits_in_float32() -> None:
    rows = noisy((1, 4000, 3)) + 1000
    single, double = Moments(1, 3), Moments(1, 3)
    for part in rows.split(500, 1):
        single.add(part.float())
        double.add(part.float().double())
    torch.testing.assert_close(single.covariance(), double.covariance(), rtol=1e-5, atol=1e-6)


def test_moments_of_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="no rows"):
        _ = Moments(1, 4).mean


def test_the_largest_sums_become_coarse_first() -> None:
    wide, small = Moments(1, 90), Moments(1, 10)
    fit_memory([(wide, 9), (small, 1)], 20_000, 1000)
    assert (wide.blocks, small.blocks) == (9, 1)
    assert wide.bytes + small.bytes <= 20_000
    fit_memory([(wide, 9), (small, 1)], 3_500, 1000)
    assert (wide.blocks, small.blocks) == (90, 1)
    with pytest.raises(DataError, match="memory_limit"):
        fit_memory([(wide, 9), (small, 1)], 100, 1000)
    wide.blocks = 1
    fit_memory([(wide, 9)], 1 << 30, 80)
    assert wide.blocks == 9


@pytest.mark.parametrize("centred", [True, False])
def test_fold_is_the_minimum_of_the_ridge_loss(centred: bool) -> None:
    """Against lstsq on features with √λ·I below them, and the error on the rows themselves."""
    rows, weight = rows_of(200, 7) - 28, noisy((3, 7), 9)
    kept, gone, share = torch.tensor([0, 2, 3, 6]), torch.tensor([1, 4, 5]), 0.1
    mean = rows.mean(0)
    spread = (rows - mean).T @ (rows - mean) / 200
    cross = spread[:, kept]
    part = Pairing(torch.arange(7), kept, spread, cross, cross[kept], (mean, mean[kept]))
    options: Any = {"fixed": not centred, "share": share, "rows": 200}
    found = fold(weight, part, method="least_squares", **options)
    shown = rows - mean if centred else rows
    moment = shown.T @ shown / 200
    ridge = share * float(moment.diagonal()[kept].mean())
    assert found.ridge == pytest.approx(ridge)
    target = shown[:, gone] @ weight[:, gone].T / 200**0.5
    root = ridge**0.5 * torch.eye(4, dtype=torch.float64)
    design = torch.cat([shown[:, kept] / 200**0.5, root])
    best = torch.linalg.lstsq(design, torch.cat([target, target.new_zeros(4, 3)])).solution
    change = found.weight - weight[:, kept]
    torch.testing.assert_close(change, best.T, **CLOSE)
    left = rows[:, gone] @ weight[:, gone].T - rows[:, kept] @ change.T - found.shift
    torch.testing.assert_close(found.errors[3], left.square().mean(0), **CLOSE)
    assert bool(found.shift.any()) == centred


def test_singular_matrices_are_solved() -> None:
    row = noisy((1, 5))
    matrix, right = row.T @ row, noisy((2, 1)) @ row
    solution, ridge = solve_ridge(matrix, right, 0.0)
    assert ridge > 0
    torch.testing.assert_close(solution @ matrix, right, rtol=1e-4, atol=1e-6)
    indefinite = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    solution, ridge = solve_ridge(indefinite, torch.ones(1, 2, dtype=torch.float64), 1e-12)
    assert bool(torch.isfinite(solution).all())
    nothing, _ = solve_ridge(torch.zeros(3, 3), torch.zeros(2, 3), 0.0)
    assert not nothing.any()


def test_few_rows_raise_the_ridge() -> None:
    variance = torch.ones(8)
    assert ridge_of(variance, 1e-3, rows=8, columns=8) == pytest.approx(1e-3)
    assert ridge_of(variance, 1e-3, rows=4, columns=8) == pytest.approx(0.2)
    assert ridge_of(variance, 0.5, rows=4, columns=8) == pytest.approx(0.5)
