"""What no choice of units exceeds: an upper bound on the importance that a budget leaves.

Every cost counts cells: positions of one dim times positions of the next.  A cell is saved once,
whoever takes it, so what is saved in all is at most the sum of what each chain saves alone from
the dense model.  With that sum in place of the cost, chains are independent, and the dual of
:mod:`prunus.planner.lagrange` bounds what they retain together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Mask
from prunus.planner.cost import CostState
from prunus.planner.curves import CurveSource
from prunus.planner.lagrange import Pricing

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def least_loss(
    state: CostState, chains: Sequence[Ints], scores: Floats, limits: Sequence[int], fixed: Mask
) -> float | None:
    """No choice of quanta within the limits loses less than this sum of scores.

    None where a cost has a term that falls when widths grow: what is said above does not hold then.

    Parameters
    ----------
    state
        Costs; it is left with exactly the quanta of ``fixed`` gone.
    chains
        Quanta that may leave.
    scores
        Of every quantum.
    limits
        Of every cost.
    fixed
        Quanta that are gone in every choice.
    """
    if any((constants < 0).any() for constants in state.constants):
        return None
    alike = [part for chain in chains for part in _alike(state, chain, scores)]
    source = CurveSource(state, alike, scores, fixed)
    curves = source.curves(np.zeros(len(alike), dtype=np.int64))
    room = np.array(limits, dtype=np.float64) - source.costs
    pricing = Pricing(curves, room, curves.possible)
    pricing.solve(np.zeros(len(room)))
    return max(0.0, -pricing.least)


def _alike(state: CostState, chain: Ints, scores: Floats) -> list[Ints]:
    """Parts of a chain in which every quantum saves as much as any other, by ascending score.

    Of such a part the first ones are the best choice, however many go.
    """
    kinds = state.likeness(chain)
    order = np.lexsort((np.arange(len(chain)), scores[chain], kinds))
    ids, kinds = chain[order], kinds[order]
    return np.split(ids, np.flatnonzero(np.diff(kinds)) + 1)
