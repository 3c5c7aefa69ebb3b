"""A difference in float32 that may be rounding is looked at again in float64."""

from __future__ import annotations

import torch

from prunus.tracer.copies import duplicate
from prunus.verifier.case import TOLERANCE, Case
from prunus.verifier.comparison import compare
from prunus.verifier.permutation import relative_error, to_double
from prunus.verifier.structure import other_count, other_positions, stale_attribute

DOUBTFUL = 1e-2
"""A float32 difference below this may be rounding that depth amplified; float64 tells."""

AMPLIFIED = 10.0
"""So may a greater one, up to this many times what float64 changes in the masked original."""


def error_in_float64(case: Case, error: float) -> float | None:
    """The error in float64 where that shows the error in float32 to be rounding; else None.

    That needs a model that runs the same operators in float64.
    """
    wide = _in_double(case)
    if wide is None:
        return None
    try:
        if error >= DOUBTFUL and error >= AMPLIFIED * relative_error(wide.masked, case.masked):
            return None
        compared = compare(wide)
        same = not (other_positions(wide) or stale_attribute(wide) or other_count(wide))
    except Exception:  # an operator, or the cut model's forward, may insist on its type
        return None
    exact = same and not compared.reason and compared.rel_err <= TOLERANCE[torch.float64]
    return compared.rel_err if exact and wide.dtype == torch.float64 else None


def _in_double(case: Case) -> Case | None:
    """The same case with weights and inputs in float64; None where it runs other operators."""
    try:
        original = duplicate(case.original).double()
        source = original if case.source is case.original else duplicate(case.source).double()
        args, kwargs = to_double((case.args, case.kwargs))
        outputs = case.graph.kept_outputs
        wide = Case(case.plan, original, source, args, kwargs, outputs=outputs)
        same = [n.target for n in wide.graph.program.nodes] == [
            n.target for n in case.graph.program.nodes
        ]
    except Exception:  # a forward that insists on its own type may raise anything
        return None
    return wide if same else None
