"""Optimal brain surgeon: what a unit is worth once the others have made up for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prunus.calibration.im2col import matrix_of
from prunus.calibration.sites import Site
from prunus.graph.axis import Axis
from prunus.graph.groups import Group
from prunus.importance.magnitude import places_of
from prunus.importance.reconstruction import Reconstruction, removal_order
from prunus.importance.registry import Context, Scores, importance

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
