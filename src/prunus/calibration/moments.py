"""Means and second moments of what weights read, as sums that can be added up.

Sums are taken around a shift, the mean of the first rows: a mean that is large beside the spread
would cost digits otherwise.  Sums over a part of the rows are in float32 at least, those over all
parts in float64.  A repair reads them as pairs: what the dense model reads, and what is read now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunus.errors import DataError


def nothing_seen() -> DataError:
    """The error for sums without rows."""
    return DataError(
        "no rows of these features were seen",
        why="the forward did not run what it ran when it was traced",
        fix="trace the model with inputs like those of the calibration data",
    )


@dataclass(eq=False)
class Moments:
    """Sums over rows of features, for every group of a convolution apart.

    Attributes
    ----------
    groups, columns
        There are ``columns`` features in every group.
    blocks
        How many equal parts of a group's columns have products among themselves alone: 1 if all
        products are summed up, as many as there are columns if only squares are.
    count
        Rows seen.
    shift, total
        What rows are compared with, and Σ (h − shift); float64 of shape ``(groups, columns)``.
    product
        Σ (h − shift)(h − shift)ᵀ, float64 of shape ``(groups, blocks, n, n)`` with
        ``n = columns / blocks``.
    """

    groups: int
    columns: int
    blocks: int = 1
    count: int = 0
    shift: Tensor | None = field(default=None, repr=False)
    total: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    product: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)

    @property
    def bytes(self) -> int:
        """Memory that the sums take, allocated yet or not."""
        return 8 * self.groups * (self.columns**2 // self.blocks + 2 * self.columns)

    @property
    def mean(self) -> Tensor:
        """E h, shape ``(groups, columns)``."""
        return self._shift + self.total / self.count

    def covariance(self) -> Tensor:
        """E (h − E h)(h − E h)ᵀ by block, shape ``(groups, blocks, n, n)``."""
        offset = self._by_block(self.total / self.count)
        return self.product / self.count - offset[..., :, None] * offset[..., None, :]

    def second(self) -> Tensor:
        """E h hᵀ by block, shape ``(groups, blocks, n, n)``."""
        mean = self._by_block(self.mean)
        return self.covariance() + mean[..., :, None] * mean[..., None, :]

    def add(self, rows: Tensor) -> None:
        """Add rows of features, shape ``(groups, rows, columns)``."""
        if not rows.shape[1]:
            return
        if rows.device.type == "mps":  # which has no float64
            rows = rows.cpu()
        if rows.dtype not in (torch.float32, torch.float64):
            rows = rows.float()
        if self.shift is None:
            self._begin(rows.mean(1, dtype=torch.float64))
        centred = rows - self._shift.to(rows.dtype)[:, None]
        # What float32 makes of the shift is what was taken away.
        self.total += centred.sum(1, dtype=torch.float64)
        self.count += rows.shape[1]
        if self.blocks == self.columns:
            self.product += centred.square().sum(1, dtype=torch.float64)[..., None, None]
            return
        parts = centred.unflatten(2, (self.blocks, -1)).transpose(1, 2)
        for own, part in zip(self.product, parts, strict=True):
            own += part.mT @ part

    def reduce(self, sum_over: Callable[[Tensor], Tensor]) -> None:
        """Become the sums over the rows of all processes; ``sum_over`` adds up what each gives it.

        Sums around different shifts can't be added: all move to the mean of the shifts first.
        """
        if self.shift is None:
            self._begin(torch.zeros(self.groups, self.columns, dtype=torch.float64))
        count, seen = self.count, torch.tensor(float(self.count > 0), dtype=torch.float64)
        self.count = int(sum_over(torch.tensor(count, dtype=torch.float64)))
        shift = sum_over(self._shift) / sum_over(seen).clamp_min(1)
        gap, total = self._by_block(self._shift - shift), self._by_block(self.total)
        cross = total[..., :, None] * gap[..., None, :]
        moved = cross + cross.mT + count * gap[..., :, None] * gap[..., None, :]
        self.product = sum_over(self.product + moved)
        self.total = sum_over(self.total + count * (self._shift - shift))
        self.shift = shift if self.count else None

    @property
    def _shift(self) -> Tensor:
        if self.shift is None:
            raise nothing_seen()
        return self.shift

    def _begin(self, shift: Tensor) -> None:
        # A shift that float32 holds exactly, so that it is the same for rows of any type.
        self.shift = shift.float().double()
        self.total = torch.zeros_like(self.shift)
        n = self.columns // self.blocks
        self.product = self.shift.new_zeros(self.groups, self.blocks, n, n)

    def _by_block(self, values: Tensor) -> Tensor:
        blocks: Tensor = values.unflatten(1, (self.blocks, -1))
        return blocks


def fit_memory(wanted: Sequence[tuple[Moments, int]], limit: int, widest: int) -> None:
    """Make sums coarser until they take ``limit`` bytes at most, the largest first.

    Parameters
    ----------
    wanted
        Every sum with the number of taps that its columns consist of: the first step is a block
        for each tap, the second is squares alone.
    widest
        Columns above which products are taken by tap in any case.

    Raises
    ------
    DataError
        If not even the squares fit.
    """
    for moments, taps in wanted:
        if moments.columns > widest and taps > 1:
            moments.blocks = taps
    taps_of = {id(moments): taps for moments, taps in wanted}
    every = [moments for moments, _ in wanted]
    while (taken := sum(moments.bytes for moments in every)) > limit:
        largest = max(every, key=lambda moments: moments.bytes)
        if largest.blocks == largest.columns:
            raise DataError(
                f"statistics of calibration data need {taken} bytes, and {limit} are allowed",
                why="not even mean and variance of what weights read fit in",
                fix="raise memory_limit",
            )
        taps = taps_of[id(largest)]
        largest.blocks = taps if largest.blocks < taps else largest.columns


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
