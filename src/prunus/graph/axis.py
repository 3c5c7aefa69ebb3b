"""Axes of tensors, the labels on them, and the roles they play."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from prunus.errors import checks_options

Label = NDArray[np.int64]
"""Array of shape ``(n, k)``: position ``i`` of a dim of size ``n`` is kept if and only if
all its ``k`` units are kept.  Unit 0 is always kept, so a column of zeros is no condition."""

Mask = NDArray[np.bool_]
"""Array of shape ``(units + 1,)``: which units stay.  Entry 0 is always true."""


@checks_options
@dataclass(frozen=True, slots=True, order=True)
class Axis:
    """One dimension of one parameter or buffer.

    >>> str(Axis("layer1.0.conv1.weight", 0))
    'layer1.0.conv1.weight[0]'
    """

    tensor: str
    dim: int

    def __str__(self) -> str:
        return f"{self.tensor}[{self.dim}]"


class Role(str, Enum):
    """What an axis does for the units on it."""

    PRODUCER = "producer"
    CONSUMER = "consumer"
    CARRIER = "carrier"


def kept_positions(label: Label, kept: Mask) -> NDArray[np.int64]:
    """Positions of a labelled dim that stay, ascending.

    >>> label = np.array([[1, 3], [1, 4], [2, 3], [2, 4]])
    >>> kept_positions(label, np.array([True, True, False, True, True]))
    array([0, 1])
    """
    return np.flatnonzero(kept[label].all(axis=1))
