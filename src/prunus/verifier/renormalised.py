"""How far the outputs are from plain silencing where kept weights change with what is removed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from prunus.graph.program import state_of, tensors_of
from prunus.tracer.renormalised import find_renormalised, names_of
from prunus.verifier.case import Case, tolerance
from prunus.verifier.permutation import relative_error
from prunus.verifier.replay import Replay

MEASURED_ALONE = 6
"""Of more groups the distance is measured once, with all of them removed."""


def renormalised_groups(case: Case) -> dict[str, float]:
    """By touched group whose removal changes kept weights: the relative distance of the outputs.

    That is between the masked original, in which weights computed from weights are those of the
    kept entries, and plain silencing, in which they stay as they are.
    """
    found = find_renormalised(case.graph.program)
    if found is None:
        return {}
    named = names_of(found, case.graph.groups)
    touched = [g for g in case.graph.groups if g.name in named and not case.kept[g.units].all()]
    inputs = [tensor.detach() for _, tensor in tensors_of([case.args, case.kwargs])]
    plain = Replay(replace(case.graph, program=found.plain), state_of(case.original)[0], inputs)
    together = len(touched) > MEASURED_ALONE
    removed = [np.concatenate([g.units for g in touched])] if together else [
        group.units for group in touched
    ]  # fmt: skip
    distances = []
    for units in removed:
        kept = case.graph.all_kept
        kept[units] = case.kept[units]
        distances.append(relative_error(plain.run(kept), case.replay.run(kept)))
    by_group = distances * len(touched) if together else distances
    return {
        group.name: by
        for group, by in zip(touched, by_group, strict=True)
        if by > tolerance(case.dtype)
    }
