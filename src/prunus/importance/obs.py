"""Optimal brain surgeon: the error of removing a unit once the kept units have made up for it.

With the features' covariance ``C`` and ``H = C + λI``, the outputs ``W h`` are missed by
``E(S) = tr W H Wᵀ − tr T_S (H_SS)⁻¹ T_Sᵀ`` with ``T = W H``, when the columns S are kept and
fitted by ridge least squares.  ``G = (H_SS)⁻¹`` is kept up to date, so that a step costs the
square of the width and not its cube.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prunus.calibration.im2col import matrix_of
from prunus.calibration.sites import Site
from prunus.graph.axis import Axis
from prunus.graph.groups import Group
from prunus.importance.magnitude import places_of
from prunus.importance.registry import Context, Scores, importance

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


STEPS = 256
"""In so many steps at most all units of a group are taken away; several at once in wider groups."""


@importance("obs", needs=("second_moment",), comparable=True)
def obs(group: Group, context: Context) -> Scores:
    """Error that a unit's removal adds to what reads the group, the rest fitted by least squares.

    Units go one after the other, the cheapest first, and each time the weights that read what
    stays take up what they can (Hassibi and Stork, 1993; Frantar and Alistarh, 2022), so that of
    two units that say the same only one is cheap.  Errors are shares of the variance of the
    outputs of a weight, added up over the weights that read the group; the lowest k scores add up
    to the error without those k units.  (Of a weight that both reads and makes the group a unit's
    own outputs don't count, but those of units that went before it do: the sum is too large there.)
    """
    parts = _all_parts(group, context)
    if not parts:
        return np.full(group.size, np.inf)
    return removal_order(parts, group.size, -(-group.size // STEPS))


def _all_parts(group: Group, context: Context) -> list[tuple[Reconstruction, float]]:
    """Of every weight that reads the group."""
    sites = [site for site in context.statistics.sites if _reads(site, group)]
    # What a depthwise convolution makes of a unit goes with the unit.
    mixing = [site for site in sites if site.window.groups < len(site.label)]
    return [part for site in mixing for part in _parts(group, site, context)]


def _reads(site: Site, group: Group) -> bool:
    return site.moments is not None and bool(np.isin(site.label, group.units).any())


def _parts(group: Group, site: Site, context: Context) -> list[tuple[Reconstruction, float]]:
    """One for each group of a convolution, and for each block of columns with products.

    With each comes the variance of the outputs of them all.
    """
    moments, window, dim = site.moments, site.window, site.dim
    if moments is None or dim is None:
        return []
    matrix = matrix_of(context.tensor(site.tensor).to(moments.total), window, dim)
    covariance = moments.covariance()
    columns = torch.arange(moments.columns).view(moments.blocks, -1)
    taken = _outputs_by_unit(group, site, 1 - dim, context).view(group.size, len(matrix), -1)
    parts = [
        Reconstruction(
            matrix[one][:, own.to(matrix.device)],
            covariance[one, block],
            _columns_by_unit(group, site, one, own),
            taken[:, one],
        )
        for one in range(moments.groups)
        for block, own in enumerate(columns)
    ]
    spread = sum(part.spread for part in parts)
    return [(part, spread) for part in parts]


def _outputs_by_unit(group: Group, site: Site, dim: int, context: Context) -> Tensor:
    """Which outputs of a weight go with each unit, shape ``(units, outputs)``."""
    outputs = context.graph.shapes[site.tensor][dim]
    groups = site.window.groups if site.window.transposed else 1
    found = np.zeros((group.size, outputs), dtype=bool)
    label = context.graph.labels.get(Axis(site.tensor, dim))
    if label is not None:
        position, unit = places_of(group, label)
        found[unit, position] = True
    return torch.as_tensor(found).repeat(1, groups)


def _columns_by_unit(group: Group, site: Site, one: int, own: Tensor) -> Tensor:
    """Where each unit stands among those columns, shape ``(units, c)``, −1 filling up."""
    position, unit = places_of(group, site.label)
    channels = len(site.label) // site.window.groups
    inside = position // channels == one
    channel, unit = position[inside] % channels, unit[inside]
    taps = np.arange(site.window.taps)
    at = (taps * channels + channel[:, None]).ravel()
    owner = np.repeat(unit, len(taps))
    first, width = int(own[0]), len(own)
    here = (at >= first) & (at < first + width)
    at, owner = at[here] - first, owner[here]
    order = np.argsort(owner, kind="stable")
    at, owner = at[order], owner[order]
    counts = np.bincount(owner, minlength=group.size)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.full((group.size, max(1, counts.max())), -1)
    found[owner, rank] = at
    return torch.as_tensor(found)
