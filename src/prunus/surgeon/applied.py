"""Which plans a model has been cut by: remembered here, not on the model, as long as it lives."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import reduce
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from prunus.errors import PlanError
from prunus.graph.plans import Plan
from prunus.tracer.follow import is_config


@dataclass(frozen=True)
class Applied:
    """The plans that were applied to a model, the first one first.

    ``config`` is a copy of what its config said before the first of them.
    """

    plans: tuple[Plan, ...]
    config: Any


_APPLIED: WeakKeyDictionary[nn.Module, Applied] = WeakKeyDictionary()
"""A copy of a model is another model, of which nothing is known."""


def applied_to(model: nn.Module) -> Applied | None:
    """What was applied to a model; None if nothing was."""
    return _APPLIED.get(model)


def set_applied(model: nn.Module, applied: Applied | None) -> None:
    """What is to be known of a model, instead of what was."""
    if applied is None:
        _APPLIED.pop(model, None)
    elif _APPLIED.get(model) is not applied:
        _APPLIED[model] = applied


def copy_config(model: nn.Module) -> Any:
    """A copy of the config that a model keeps, before it is cut.

    None if it keeps none, or one that can't be copied.
    """
    config = getattr(model, "__dict__", {}).get("config")
    try:
        return copy.deepcopy(config) if is_config(config) else None
    except Exception:  # a class may refuse with any error
        return None


def config_before(model: nn.Module) -> Any:
    """What the config said before the first cut: the present one, if nothing was cut."""
    applied = _APPLIED.get(model)
    return copy_config(model) if applied is None else applied.config


def remember(model: nn.Module, plan: Plan, config: Any) -> None:
    """Note that a plan has been applied, after those before it; ``config`` is from before it."""
    known = _APPLIED.get(model) or Applied((), config)
    _APPLIED[model] = Applied((*known.plans, plan), known.config)


def applied_plan(model: nn.Module) -> Plan | None:
    """What has been applied to the model in this process, as one plan for the original.

    Raises
    ------
    PlanError
        If the plans don't follow one another, or only a part of the model was cut.
    """
    applied = _APPLIED.get(model)
    if applied is None:
        for name, part in model.named_modules():
            if part in _APPLIED:
                raise PlanError(
                    "a plan for a part of this model has been applied, none for all of it",
                    where=name,
                    fix="save that part, or trace, plan and cut the model as a whole",
                )
        return None
    return reduce(Plan.then, applied.plans)
