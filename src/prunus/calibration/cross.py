"""Second moments of what one weight reads in two runs: of the dense model, and of a smaller one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.calibration.second_moments import Moments, fit_memory


@dataclass(frozen=True, eq=False)
class Pairing:
    """Columns whose products were summed up among themselves, of one group of a convolution.

    Attributes
    ----------
    columns, kept
        Which columns of the dense weight they are, shape ``(n,)``; and which of these the smaller
        model has, shape ``(k,)``.
    dense, cross, inner
        E h hᵀ, E h gᵀ and E g gᵀ around the means, shapes ``(n, n)``, ``(n, k)`` and ``(k, k)``.
    means
        E h and E g, shapes ``(n,)`` and ``(k,)``.
    """

    columns: Tensor
    kept: Tensor
    dense: Tensor
    cross: Tensor
    inner: Tensor
    means: tuple[Tensor, Tensor]


class OwnMoments:
    """Sums over rows of the dense model alone, paired with what stays of the same rows.

    Parameters
    ----------
    moments
        Of the dense columns.
    stay
        Which channels stay, shape ``(groups, channels of a group)``.
    taps
        Columns of a channel; columns are ordered by tap, then by channel.
    """

    def __init__(self, moments: Moments, stay: Tensor, taps: int = 1) -> None:
        self.count, self.exact, self.like = moments.count, moments.blocks == 1, moments.total
        self._blocks, self._mean = moments.blocks, moments.mean
        self._covariance = moments.covariance()
        self._stay = stay.to(self._mean.device).repeat(1, taps)

    def pairings(self, group: int) -> list[Pairing]:
        """The moments of a group of a convolution, block by block."""
        found = []
        columns = torch.arange(self._stay.shape[1], device=self._stay.device)
        for block, own in enumerate(columns.view(self._blocks, -1)):
            dense, mean = self._covariance[group, block], self._mean[group][own]
            kept = self._stay[group][own].nonzero()[:, 0]
            cross = dense[:, kept]
            found.append(Pairing(own, kept, dense, cross, cross[kept], (mean, mean[kept])))
        return found


class CrossMoments:
    """Sums over pairs of rows: h of the dense model, and g of a smaller one, of the same place.

    Both are summed up as one vector ``[h, g]``, so that rounding hits what is equal in both alike.

    Parameters
    ----------
    stay
        Which channels the smaller model has, shape ``(groups, channels of a group)``.
    taps
        Columns of a channel; columns are ordered by tap, then by channel.
    blocks
        1, or ``taps`` where only the columns of a tap have products among themselves.

    Attributes
    ----------
    whole
        Whether rows of the smaller model are given at the dense width, with zeros where it has no
        channel, and not as what it reads.
    """

    def __init__(self, stay: Tensor, taps: int = 1, blocks: int = 1) -> None:
        self.stay, self.taps = stay, taps
        self.whole = len(stay) > 1  # a group that goes leaves the others with other numbers
        width = stay.shape[1] if self.whole else int(stay.sum())
        self.joint = Moments(len(stay), taps * (stay.shape[1] + width), blocks)

    @property
    def count(self) -> int:
        """Pairs of rows seen."""
        return self.joint.count

    @property
    def like(self) -> Tensor:
        """A tensor of the type and on the device of the sums."""
        return self.joint.total

    @property
    def exact(self) -> bool:
        """Whether all products were summed up."""
        return self.joint.blocks == 1

    def add(self, dense: Tensor, smaller: Tensor) -> None:
        """Add pairs of rows, each of shape ``(groups, rows, columns)``."""
        blocks = self.joint.blocks
        pair = (dense.unflatten(2, (blocks, -1)), smaller.unflatten(2, (blocks, -1)))
        self.joint.add(torch.cat(pair, 3).flatten(2))

    def squares_alone(self) -> None:
        """From now on every column has products with itself alone; before the first row."""
        self.whole = True
        columns = self.taps * self.stay.shape[1]
        self.joint = Moments(len(self.stay), 2 * columns, columns)

    def pairings(self, group: int) -> list[Pairing]:
        """The moments of a group of a convolution, block by block."""
        device = self.joint.total.device
        there = self.stay[group].to(device).repeat(self.taps)
        columns = torch.arange(len(there), device=device).view(self.joint.blocks, -1)
        covariance = self.joint.covariance()[group]
        means = self.joint.mean[group].view(self.joint.blocks, -1)
        found = []
        for own, moment, mean in zip(columns, covariance, means, strict=True):
            n, kept = len(own), there[own].nonzero()[:, 0]
            read = n + (kept if self.whole else torch.arange(len(kept), device=device))
            found.append(
                Pairing(
                    own,
                    kept,
                    moment[:n, :n],
                    moment[:n, read],
                    moment[read][:, read],
                    (mean[:n], mean[read]),
                )
            )
        return found


def fit_pairs(wanted: Sequence[CrossMoments], limit: int) -> None:
    """Make sums coarser until they take ``limit`` bytes at most; see :func:`fit_memory`."""
    fit_memory([(one.joint, one.taps) for one in wanted], limit, widest=limit)
    for one in wanted:
        if one.joint.blocks == one.joint.columns:
            one.squares_alone()
