"""Find the groups that make a plan fail, so that the rest of it can stand.

What the tracer could not foresee (a width that a comparison fixes, a size that went through a
float) shows when the pruned model's own forward is compared with the masked original.  Then
the offending groups are found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group

MOST_CULPRITS = 16
"""When more groups than this fail one by one, the model as a whole is not understood."""


def find_culprits(graph: CouplingGraph, kept: Mask, fails: Callable[[Mask], str]) -> dict[str, str]:
    """Groups that have to stay whole so that a selection doesn't fail, with what went wrong.

    Parameters
    ----------
    graph, kept
        The selection that fails.
    fails
        What is wrong with a selection; empty if nothing is.  It is asked about log2(groups)
        times for each culprit.

    Returns
    -------
    dict
        Group name → reason, empty if the selection doesn't fail.  Where more than sixteen
        groups are to blame, every touched group is named.
    """
    touched = [group for group in graph.groups if not kept[group.units].all()]
    culprits: dict[str, str] = {}

    def removing(groups: Sequence[Group]) -> Mask:
        mask = graph.all_kept
        for group in groups:
            if group.name not in culprits:
                mask[group.units] = kept[group.units]
        return mask

    while reason := fails(removing(touched)):
        if len(culprits) == MOST_CULPRITS:
            return {group.name: reason for group in touched}
        low, high = 0, len(touched)  # removing the first `high` fails, the first `low` does not
        while high - low > 1:
            middle = (low + high) // 2
            found = fails(removing(touched[:middle]))
            if found:
                high, reason = middle, found
            else:
                low = middle
        culprits[touched[high - 1].name] = reason
    return culprits
