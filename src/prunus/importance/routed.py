"""Experts by what they add to the tokens that the router sends them."""

from __future__ import annotations

import numpy as np

from prunus.graph.groups import Group
from prunus.importance.registry import Context, Scores, importance


@importance("reap", needs=("routed",))
def reap(group: Group, context: Context) -> Scores:
    """Mean of g·‖f(x)‖ over the tokens that are routed to an expert, g the router's weight.

    REAP (Lasby et al., 2025, Cerebras); an expert that no token reaches has the score 0.  Groups
    that are not experts can't be scored.
    """
    units = context.statistics.units
    norms, tokens = units["routed"][group.units], units["routed_tokens"][group.units]
    if not tokens.any():
        return np.full(group.size, np.inf)
    return np.asarray(norms / np.maximum(tokens, 1))
