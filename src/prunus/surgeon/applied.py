"""Which plans a model has been cut by: remembered here, not on the model, as long as it lives."""

from __future__ import annotations

import copy
from functools import reduce
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from prunus.errors import PlanError
from prunus.plans import Plan
from prunus.tracer.provenance import is_config

_APPLIED: WeakKeyDictionary[nn.Module, tuple[Plan, ...]] = WeakKeyDictionary()
"""A copy of a model is another model, of which nothing is known."""


_CONFIGS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""What the config of a model said before the first cut."""


def copy_config(model: nn.Module) -> Any:
    """A copy of the config that a model keeps, before it is cut; None if it keeps none."""
    config = getattr(model, "__dict__", {}).get("config")
    return copy.deepcopy(config) if is_config(config) else None


def config_before(model: nn.Module) -> Any:
    """What the config said before the first cut: the present one, if nothing was cut."""
    return _CONFIGS[model] if model in _CONFIGS else copy_config(model)


def remember(model: nn.Module, plan: Plan, config: Any) -> None:
    """Note that a plan has been applied, after those before it; ``config`` is from before it."""
    if not _APPLIED.get(model):
        _CONFIGS[model] = config
    _APPLIED[model] = (*_APPLIED.get(model, ()), plan)


def plans_of(model: nn.Module) -> tuple[Plan, ...]:
    """All that have been applied, the first one first."""
    return _APPLIED.get(model, ())


def remember_only(model: nn.Module, plans: tuple[Plan, ...]) -> None:
    """Forget all others: when a cut is undone."""
    _APPLIED[model] = plans
    if not plans:
        _CONFIGS.pop(model, None)


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
