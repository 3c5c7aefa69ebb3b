"""Which plans a model has been cut by: remembered here, not on the model, as long as it lives."""

from __future__ import annotations

from functools import reduce
from weakref import WeakKeyDictionary

from torch import nn

from prunus.errors import PlanError
from prunus.plans import Plan

_APPLIED: WeakKeyDictionary[nn.Module, tuple[Plan, ...]] = WeakKeyDictionary()
"""A copy of a model is another model, of which nothing is known."""


def remember(model: nn.Module, plan: Plan) -> None:
    """Note that a plan has been applied, after those before it."""
    _APPLIED[model] = (*_APPLIED.get(model, ()), plan)


def plans_of(model: nn.Module) -> tuple[Plan, ...]:
    """All that have been applied, the first one first."""
    return _APPLIED.get(model, ())


def remember_only(model: nn.Module, plans: tuple[Plan, ...]) -> None:
    """Forget all others: when a cut is undone."""
    _APPLIED[model] = plans


def applied_plan(model: nn.Module) -> Plan | None:
    """What has been applied to the model in this process, as one plan for the original.

    Raises
    ------
    PlanError
        If the plans don't follow one another, or only a part of the model was cut.
    """
    plans = _APPLIED.get(model, ())
    if not plans:
        for name, part in model.named_modules():
            if _APPLIED.get(part):
                raise PlanError(
                    "a plan for a part of this model has been applied, none for all of it",
                    where=name,
                    fix="save that part, or trace, plan and cut the model as a whole",
                )
        return None
    return reduce(Plan.then, plans)
