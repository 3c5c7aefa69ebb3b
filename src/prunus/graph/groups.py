"""Groups of units that share a column of a producing axis, and what a choice has to respect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from prunus.graph.axis import Axis, Label, Mask, Role, kept_positions


@dataclass(frozen=True, eq=False)
class Group:
    """Units that compete with one another, and the axes on which they live.

    Attributes
    ----------
    name
        Stable and readable: the first producing axis, e.g. ``"layer1.0.conv1.weight[0]"``; a
        suffix ``/2`` tells a second group on the same axis (the dims beside the heads, say).
    units
        Ascending unit ids, shape ``(size,)``.
    axes
        Every axis that holds at least one of the units, with its role, in the model's order.
    mixing
        Whether a norm, softmax or reduction runs over the units, so that removing one changes
        what the others become.
    """

    name: str
    units: NDArray[np.int64]
    axes: tuple[tuple[Axis, Role], ...]
    mixing: bool

    @property
    def size(self) -> int:
        return len(self.units)


def connect(labels: Mapping[Axis, Label], roles: Mapping[Axis, Role], units: int) -> Label:
    """Component id of every unit, shape ``(units + 1,)``; entry 0 is meaningless.

    Two units are connected when they share a column of a producing axis.  Consuming axes don't
    connect: a convolution after a concatenation reads several groups and makes them no one.
    Units without a producing axis are connected by whatever axes carry them.
    """
    produced = np.zeros(units + 1, dtype=bool)
    rows: list[NDArray[np.int64]] = []
    cols: list[NDArray[np.int64]] = []

    def link(label: Label) -> None:
        for column in label.T:
            members = np.unique(column[column > 0])
            if len(members) > 1:
                rows.append(np.full(len(members) - 1, members[0]))
                cols.append(members[1:])

    producing = [axis for axis in labels if roles[axis] is Role.PRODUCER]
    for axis in producing:
        link(labels[axis])
        produced[labels[axis]] = True
    for axis in labels:
        if roles[axis] is not Role.PRODUCER and not produced[labels[axis][labels[axis] > 0]].any():
            link(labels[axis])
    if not rows:
        return np.arange(units + 1)
    left, right = np.concatenate(rows), np.concatenate(cols)
    size = units + 1
    edges = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(size, size))
    return np.asarray(connected_components(edges, directed=False)[1], dtype=np.int64)


def form_groups(
    labels: Mapping[Axis, Label],
    roles: Mapping[Axis, Role],
    units: int,
    mixing: NDArray[np.bool_],
) -> tuple[Group, ...]:
    """Groups in the order of their first axis; ``labels`` in the model's order."""
    component = connect(labels, roles, units)
    members: dict[int, list[tuple[Axis, Role]]] = {}
    for axis, label in labels.items():
        for index in np.unique(component[label[label > 0]]):
            members.setdefault(int(index), []).append((axis, roles[axis]))
    order = np.argsort(component[1:], kind="stable") + 1
    bounds = np.flatnonzero(np.diff(component[order])) + 1
    units_of = {
        int(component[part[0]]): np.sort(part) for part in np.split(order, bounds) if len(part)
    }

    groups: list[Group] = []
    taken: dict[str, int] = {}
    for index, axes in members.items():
        first = next((axis for axis, role in axes if role is Role.PRODUCER), axes[0][0])
        taken[str(first)] = count = taken.get(str(first), 0) + 1
        name = str(first) if count == 1 else f"{first}/{count}"
        owned = units_of[index]
        groups.append(Group(name, owned, tuple(axes), bool(mixing[owned].any())))
    return tuple(groups)


@dataclass(frozen=True, eq=False)
class Lockstep:
    """Sets of units that must all lose the same number of members, or numbers in proportion.

    ``kind`` says where it comes from: *balanced* (the blocks of a grouped convolution or of a
    group norm), *equal count* (one attribute governs several axes), *rep* (the query heads of
    every KV group).  ``sets`` has shape ``(blocks, members)``, in positional order.  With
    ``rates``, one per set, the numbers are in that proportion: a head and 64 of the hidden width.
    """

    kind: Literal["balanced", "equal count", "rep"]
    sets: tuple[NDArray[np.int64], ...]
    reason: str
    rates: tuple[int, ...] = ()

    def violation(self, kept: Mask) -> str:
        """How a selection breaks it; empty if it doesn't."""
        gone = [int((~kept[units]).sum()) for units in self.sets]
        rates = self.rates or (1,) * len(gone)
        if len({Fraction(n, rate) for n, rate in zip(gone, rates, strict=True)}) <= 1:
            return ""
        return f"{self.reason}: {' and '.join(map(str, gone))} are removed"


@dataclass(frozen=True, eq=False)
class AtLeast:
    """A dim, or a slice of one, that has to keep at least ``least`` positions."""

    label: Label
    reason: str
    least: int = 1

    def violation(self, kept: Mask) -> str:
        """How a selection breaks it; empty if it doesn't."""
        left = len(kept_positions(self.label, kept))
        if left >= self.least:
            return ""
        return f"{self.reason}: {left} would be kept, and at least {self.least} are"


@dataclass(frozen=True, eq=False)
class Aligned:
    """A dim of which a kernel takes multiples of ``multiple`` positions only."""

    label: Label
    multiple: int
    reason: str

    def violation(self, kept: Mask) -> str:
        """How a selection breaks it; empty if it doesn't."""
        left = len(kept_positions(self.label, kept))
        fits = left % self.multiple == 0
        return "" if fits else f"{self.reason}: {left} is no multiple of {self.multiple}"


@dataclass(frozen=True, eq=False)
class Rescale:
    """Weights to be multiplied by √(kept / size) when a head dim of ``size`` shrinks.

    The operator takes its softmax scale from the dim that it sees; the query makes up for it.
    ``targets`` are (tensor, dim, positions).
    """

    label: Label
    targets: tuple[tuple[str, int, tuple[int, ...]], ...]

    def factor(self, kept: Mask) -> float:
        """What to multiply by; 1 if the dim stays whole."""
        return float(np.sqrt(len(kept_positions(self.label, kept)) / len(self.label)))


@dataclass(frozen=True, eq=False)
class Proportional:
    """An integer that shrinks with sets of units: ``size`` × Π kept / members."""

    name: str
    size: int
    sets: tuple[NDArray[np.int64], ...]

    def of(self, kept: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Its values for the numbers of units kept in each set; arrays of one shape.

        >>> heads = Proportional("heads", 8, (np.arange(4), np.arange(2)))
        >>> heads.of([np.array([3, 4]), np.array([1, 2])])
        array([3, 8])
        """
        members = prod(len(units) for units in self.sets)
        return np.asarray(self.size * prod(kept) // members, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Divisible:
    """A width of which another one has to be a divisor: hidden size and number of heads."""

    width: Proportional
    divisor: Proportional
    reason: str

    def holds(self, kept: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> Mask:
        """Whether it holds, for the number of units kept in a set, or for arrays of numbers."""
        width, divisor = (
            one.of([kept(units) for units in one.sets]) for one in (self.width, self.divisor)
        )
        return np.asarray(width % np.maximum(divisor, 1) == 0)

    def violation(self, kept: Mask) -> str:
        """How a selection breaks it; empty if it doesn't."""
        return "" if self.holds(lambda units: kept[units].sum()) else self.reason


@dataclass(frozen=True, eq=False)
class Preferred:
    """A group whose width should be a multiple of a number wherever a budget allows it."""

    group: str
    multiple: int
    reason: str

    def violation(self, kept: Mask) -> str:
        """Nothing: what is preferred is not demanded."""
        return ""


Constraint = Lockstep | AtLeast | Aligned | Divisible | Preferred


@dataclass(frozen=True, slots=True)
class Pin:
    """Why something can't be pruned: the operator, the module that ran it, the source line."""

    reason: str
    operator: str
    module: str
    source: str

    def __str__(self) -> str:
        line = f"({self.source})" if self.source else ""
        place = " in ".join(part for part in (self.operator, self.module) if part)
        context = " ".join(part for part in (place, line) if part)
        return f"{self.reason} [{context}]" if context else self.reason


def find_violation(constraints: Iterable[Constraint], kept: Mask) -> str:
    """The reason of the first constraint that a selection breaks; empty if it breaks none.

    >>> halves = Lockstep("balanced", (np.array([1, 2]), np.array([3, 4])), "two groups")
    >>> find_violation([halves], np.array([True, False, True, False, True]))
    ''
    >>> find_violation([halves], np.array([True, False, True, True, True]))
    'two groups: 1 and 0 are removed'
    """
    return next(filter(None, (constraint.violation(kept) for constraint in constraints)), "")
