"""How well the kept columns of a weight reproduce its outputs, as columns are removed.

With the features' covariance ``C`` and ``H = C + λI``, the outputs ``W h`` are missed by
``E(S) = tr W H Wᵀ − tr T_S (H_SS)⁻¹ T_Sᵀ`` with ``T = W H``, when the columns S stay and are
fitted by ridge least squares.  ``G = (H_SS)⁻¹`` is kept up to date, so that a step costs the
square of the width and not its cube.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunus.importance.registry import Scores

RIDGE = 1e-3
"""λ as a share of the mean variance of the columns."""


class Reconstruction:
    """The columns of one weight, and of one group of a convolution.

    Parameters
    ----------
    matrix
        W, float64 of shape ``(outputs, d)``.
    moment
        Covariance of the columns, float64 of shape ``(d, d)``.
    columns
        The columns that each unit is read by, shape ``(units, c)``; −1 fills up.
    taken
        Whether an output goes with a unit, shape ``(units, outputs)``: it is not missed.

    Attributes
    ----------
    spread
        tr W C Wᵀ: the variance of all outputs together.
    """

    def __init__(
        self, matrix: Tensor, moment: Tensor, columns: Tensor, taken: Tensor | None = None
    ) -> None:
        width = len(moment)
        self.spread = float(((matrix @ moment) * matrix).sum())
        level = float(moment.diagonal().mean())
        # One more column, of no weight, stands for those that are not there.
        self._inverse = torch.eye(width + 1, dtype=moment.dtype, device=moment.device)
        if level > 0:
            ridge = RIDGE * level * torch.eye(width, dtype=moment.dtype, device=moment.device)
            self._inverse[:width, :width] = torch.linalg.inv(moment + ridge)
        self._weight = torch.nn.functional.pad(matrix, (0, 1))
        self._nothing = width
        self._taken = None if taken is None else taken.to(moment.device)
        self._columns = columns.to(moment.device).clone()
        self._columns[self._columns < 0] = width

    def costs(self) -> Tensor:
        """By how much E grows when a unit goes, for every unit: shape ``(units,)``.

        ``Σ_rows W_g (G_gg)⁻¹ W_gᵀ`` for the columns g of a unit (Hassibi and Stork, 1993, for
        blocks: Kurtic et al., 2023); 0 for units that are gone.
        """
        there = self._columns != self._nothing
        own = self._inverse[self._columns[:, :, None], self._columns[:, None, :]]
        own = own * (there[:, :, None] & there[:, None, :]) + torch.diag_embed((~there).to(own))
        read = self._weight[:, self._columns].movedim(0, -1)  # (units, c, outputs)
        cost: Tensor = (read * torch.linalg.solve(own, read)).sum(1)
        if self._taken is not None:
            cost = cost.masked_fill(self._taken, 0)
        return cost.sum(1).clamp_min(0)

    def remove(self, unit: int) -> None:
        """Remove a unit; the kept columns absorb what they can."""
        gone = self._columns[unit]
        gone = gone[gone != self._nothing].unique()
        if not len(gone):
            return
        across = self._inverse[:, gone]
        step = torch.linalg.solve(across[gone], across.mT).mT  # G[:, g] (G_gg)⁻¹
        self._weight -= self._weight[:, gone] @ step.mT
        self._inverse -= step @ across.mT
        self._weight[:, gone] = 0
        self._columns[torch.isin(self._columns, gone)] = self._nothing


def removal_order(
    parts: Sequence[tuple[Reconstruction, float]], units: int, at_once: int = 1
) -> Scores:
    """Take away all units, the cheapest first: what each adds to the error, shape ``(units,)``.

    The sum of the lowest k scores is the error without those k units, the rest fitted again: the
    whole curve of error versus width.  Scores never fall in the order in which units go.

    Parameters
    ----------
    parts
        Each with what its errors are divided by; those of 0 don't count.
    at_once
        How many go before the others are looked at again.
    """
    scores = torch.zeros(units, dtype=torch.float64)
    alive = torch.ones(units, dtype=torch.bool)
    highest = 0.0
    while alive.any():
        costs = torch.zeros(units, dtype=torch.float64)
        for part, scale in parts:
            if scale > 0:
                costs += part.costs().cpu() / scale
        costs[~alive] = torch.inf
        for unit in costs.argsort(stable=True)[: min(at_once, int(alive.sum()))].tolist():
            highest = max(highest, float(costs[unit]))
            scores[unit] = highest
            alive[unit] = False
            for part, _ in parts:
                part.remove(unit)
    found: Scores = scores.numpy()
    return found
