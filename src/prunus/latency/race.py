"""Whole models in turn: what one takes as a part of what another takes, whatever else runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray

from prunus.latency.backends import Run, stopwatch

WARM_UP = 2
"""Rounds that are not counted."""


def race(runs: Sequence[Run], rounds: int, device: torch.device) -> NDArray[np.float64]:
    """Nanoseconds of every run in every round, shape ``(rounds, runs)``, each round another order.

    Parameters
    ----------
    runs
        Forwards; see :meth:`prunus.latency.backends.Backend.prepare`.
    rounds
        Those that count; two more warm up.
    """
    take = stopwatch(device)
    orders = list(permutations(range(len(runs))))
    times = np.zeros((rounds + WARM_UP, len(runs)))
    with torch.inference_mode():
        for row in range(len(times)):
            for index in orders[row % len(orders)]:
                times[row, index] = take(runs[index])
    return times[WARM_UP:]
