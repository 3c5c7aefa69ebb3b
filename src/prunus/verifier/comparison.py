"""The comparison that everything rests on: the pruned model against the masked original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from prunus.errors import PrunusError
from prunus.tracer.sources import find_line
from prunus.verifier.case import Case
from prunus.verifier.permutation import relative_error


@dataclass(frozen=True)
class Comparison:
    """The largest relative error of the outputs; ``reason`` where there was nothing to compare."""

    rel_err: float
    reason: str = ""


def compare(case: Case, *, fast_path: bool = False) -> Comparison:
    """The pruned model's own forward on the case's inputs, against the replay with units silenced.

    Raises
    ------
    PrunusError
        If the masked original can't be computed, the plan can't be applied, or the model itself
        does not run on these inputs either.
    """
    return compare_with(case.masked, case, fast_path=fast_path)


def compare_with(
    masked: Mapping[str, Tensor], case: Case, *, fast_path: bool = False
) -> Comparison:
    """The same against outputs of a masked original that was computed in another way."""
    try:
        answer = case.run(case.pruned, fast_path=True) if fast_path else case.answer
    except PrunusError:
        raise
    except Exception as failure:  # the pruned model's own forward may raise anything
        with case.blaming_the_model():
            case.run(case.original, fast_path=fast_path)
        return Comparison(
            float("inf"),
            f"the pruned model's forward raised {type(failure).__name__} "
            f"at {find_line(failure)}: {failure}",
        )
    return Comparison(relative_error(masked, answer))
