"""Which quanta take which positions of the dims that costs speak of."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Label

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Positions:
    """The positions of some dims, by the quanta without which they can't stay.

    A position that one quantum alone can take is *lone*, and only counted; of one that several
    could take (head × dim) each taker is noted.

    Attributes
    ----------
    count, dims
        How many quanta and how many dims there are.
    full
        Positions of every dim while nothing is gone, shape ``(dims,)``.
    lone
        Rows ``(quantum, dim, times)``, ascending.
    shared
        Rows ``(quantum, position)``, ascending.
    shared_dim
        The dim of every shared position.
    """

    count: int
    dims: int
    full: Ints
    lone: Ints
    shared: Ints
    shared_dim: Ints

    @cached_property
    def lone_start(self) -> list[int]:
        """Where the rows of every quantum begin in ``lone``; one entry more than quanta + 1."""
        return self._starts(self.lone)

    @cached_property
    def shared_start(self) -> list[int]:
        """The same for ``shared``."""
        return self._starts(self.shared)

    def _starts(self, rows: Ints) -> list[int]:
        found: list[int] = np.searchsorted(rows[:, 0], np.arange(self.count + 2)).tolist()
        return found

    def lone_of(self, quantum: int) -> tuple[Ints, Ints]:
        """Dims, ascending, and how many positions of each the quantum takes alone."""
        rows = self.lone[self.lone_start[quantum] : self.lone_start[quantum + 1]]
        return rows[:, 1], rows[:, 2]

    def shared_of(self, quantum: int) -> Ints:
        """Positions that the quantum could take as well as others."""
        return self.shared[self.shared_start[quantum] : self.shared_start[quantum + 1], 1]

    def dims_of(self, quantum: int) -> list[int]:
        """Dims of which the quantum takes positions, alone or with others."""
        return [*self.lone_of(quantum)[0].tolist(), *self.shared_dim[self.shared_of(quantum)]]

    def gone(self, removed: NDArray[np.bool_]) -> Ints:
        """How many of its takers are gone, for every shared position."""
        taken = self.shared[removed[self.shared[:, 0]], 1]
        return np.bincount(taken, minlength=len(self.shared_dim))

    def widths(self, removed: NDArray[np.bool_]) -> Ints:
        """Positions of every dim that are left without the quanta of a mask."""
        rows = self.lone[removed[self.lone[:, 0]]]
        alone = np.zeros(self.dims, dtype=np.int64)
        np.add.at(alone, rows[:, 1], rows[:, 2])
        dead = self.shared_dim[self.gone(removed) > 0]
        return np.asarray(self.full - alone - np.bincount(dead, minlength=self.dims))

    def orders(self, chains: Sequence[Ints], gates: Collection[int]) -> list[Ints]:
        """The order of each chain in which what a dim needs at least is removed last.

        (A dim that is wholly the chain's keeps a position: that of its most important quantum.)
        ``gates`` stay where they are.
        """
        home = np.full(self.count + 1, -1)
        place = np.zeros(self.count + 1, dtype=np.int64)
        for n, chain in enumerate(chains):
            home[chain], place[chain] = n, np.arange(len(chain))
        quantum, dim, times = self.lone[home[self.lone[:, 0]] >= 0].T
        pairs, which = np.unique(home[quantum] * self.dims + dim, return_inverse=True)
        taken, last = np.zeros((2, len(pairs)), dtype=np.int64)
        np.add.at(taken, which, times)
        np.maximum.at(last, which, place[quantum])
        whole = taken == self.full[pairs % self.dims]
        late = [np.zeros(len(chain), dtype=np.bool_) for chain in chains]
        for n, at in zip(pairs[whole] // self.dims, last[whole], strict=True):
            late[n][at] = at > 0 or int(chains[n][0]) not in gates
        return [np.argsort(own, kind="stable") for own in late]


def read_positions(labels: Sequence[Label], owner: Ints) -> Positions:
    """Tell the positions that hang on one quantum from those that hang on several.

    ``owner`` has the quantum of every unit, 0 for units that always stay.
    """
    lone: list[Ints] = []
    takers: list[Ints] = []
    positions: list[Ints] = []
    dims: list[Ints] = []
    total, size = 0, max(1, len(labels))
    for dim, label in enumerate(labels):
        rows = np.sort(owner[label], axis=1)
        rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = 0
        several = (rows > 0).sum(axis=1)
        single = rows[several == 1].max(axis=1, initial=0)
        lone.append(single * size + dim)
        rows = rows[several > 1]
        row, column = np.nonzero(rows)
        takers.append(rows[row, column])
        positions.append(row + total)
        dims.append(np.full(len(rows), dim))
        total += len(rows)
    code, times = np.unique(joined(lone), return_counts=True)
    taker, position = joined(takers), joined(positions)
    order = np.argsort(taker, kind="stable")
    return Positions(
        count=int(owner.max(initial=0)),
        dims=len(labels),
        full=np.array([len(label) for label in labels], dtype=np.int64),
        lone=np.stack([code // size, code % size, times], axis=1),
        shared=np.stack([taker[order], position[order]], axis=1),
        shared_dim=joined(dims),
    )


def joined(parts: Iterable[Ints]) -> Ints:
    """All arrays one after the other; an empty one if there are none."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
