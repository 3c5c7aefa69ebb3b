"""What a selection of units has to respect beyond the couplings themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Label, Mask


@dataclass(frozen=True, eq=False)
class Lockstep:
    """Sets of units that must all lose the same number of members.

    ``kind`` says where it comes from: *balanced* (the blocks of a grouped convolution or of a
    group norm), *equal count* (one attribute governs several axes), *rep* (the query heads of
    every KV group).  ``sets`` has shape ``(blocks, members)``, in positional order.
    """

    kind: Literal["balanced", "equal count", "rep"]
    sets: tuple[NDArray[np.int64], ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Nonempty:
    """A dim, or a slice of one, that has to keep at least one position."""

    label: Label
    reason: str


@dataclass(frozen=True, eq=False)
class Aligned:
    """A dim of which a kernel takes multiples of ``multiple`` positions only."""

    label: Label
    multiple: int
    reason: str


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
        return float(np.sqrt(kept[self.label].all(axis=1).sum() / len(self.label)))


Constraint = Lockstep | Nonempty | Aligned


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
    for constraint in constraints:
        if isinstance(constraint, Lockstep):
            gone = [int((~kept[units]).sum()) for units in constraint.sets]
            if len(set(gone)) > 1:
                return f"{constraint.reason}: {' and '.join(map(str, gone))} are removed"
            continue
        stay = int(kept[constraint.label].all(axis=1).sum())
        if isinstance(constraint, Nonempty) and not stay:
            return f"{constraint.reason}: nothing would stay"
        if isinstance(constraint, Aligned) and stay % constraint.multiple:
            return f"{constraint.reason}: {stay} is no multiple of {constraint.multiple}"
    return ""
