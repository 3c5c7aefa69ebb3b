"""The checks of one case, in order, and what they come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from prunus.verifier.attributes import other_attributes
from prunus.verifier.case import Case, tolerance
from prunus.verifier.comparison import Comparison, compare
from prunus.verifier.paths import other_path
from prunus.verifier.rounding import error_in_float64
from prunus.verifier.settings import compare_on_fast_path, fast_path_matters
from prunus.verifier.structure import other_count, other_positions, stale_attribute
from prunus.verifier.tensors import other_tensors

STRUCTURE: tuple[Callable[[Case], str], ...] = (
    stale_attribute,
    other_count,
    other_path,
    other_tensors,
    other_attributes,
)
"""What is compared without running anything; each says what is wrong, or nothing."""


@dataclass(frozen=True)
class Judgement:
    """Of one case: the error in ``dtype``, and why it is not exact.

    ``rel_err32`` is the error in float32 where float64 showed that it is rounding.
    """

    rel_err: float
    dtype: torch.dtype
    reason: str = ""
    rel_err32: float | None = None

    @property
    def exact(self) -> bool:
        """Whether the outputs agree and nothing else is wrong."""
        return not self.reason and self.rel_err <= tolerance(self.dtype)


def judge(case: Case) -> Judgement:
    """The pruned model against the masked original, with the attention fast path off."""
    return _settle(case, compare(case))


def judge_as_users_run(case: Case, fast_path: bool) -> Judgement:
    """The same with PyTorch's settings as they are, and everything that needs no run.

    Where the attention fast path changes what the model answers, both ways are compared.
    """
    consistent = other_positions(case)
    if fast_path_matters(case, fast_path):
        found = _settle(case, compare_on_fast_path(case))
        if found.exact:
            found = judge(case)
    else:
        found = _settle(case, compare(case, fast_path=fast_path))
    reason = consistent or found.reason
    for check in STRUCTURE:
        reason = reason or check(case)
    return Judgement(found.rel_err, found.dtype, reason, found.rel_err32)


def _settle(case: Case, compared: Comparison) -> Judgement:
    """Whether a difference in float32 is rounding is told in float64."""
    error, dtype = compared.rel_err, case.dtype
    if not compared.reason and dtype == torch.float32 and error > tolerance(dtype):
        double = error_in_float64(case, error)
        if double is not None:
            return Judgement(double, torch.float64, "", error)
    return Judgement(error, dtype, compared.reason)
