"""Continuing a schedule from a checkpoint, in a new process and with a fresh model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from torch import nn

from prunus.errors import PlanError
from prunus.graph.plans import Plan
from prunus.surgeon.apply import apply
from prunus.surgeon.snapshot import Snapshot, all_or_nothing
from prunus.tracer.forward_fn import ForwardFn

VERSION = 1
"""Of what :meth:`prunus.Schedule.state_dict` returns."""


def read_plans(state: Any, own: Mapping[str, Any], done: Sequence[Plan]) -> list[Plan]:
    """The plans of a state; refused if it is none, or is not of a schedule like this one.

    Parameters
    ----------
    own
        What is asked of this schedule.
    done
        The plans that it has applied already, with which those of the state have to begin.
    """
    if not isinstance(state, Mapping) or state.get("version") != VERSION:
        raise PlanError(
            "this is not the state of a Schedule",
            fix="give what state_dict() returned",
        )
    for name, value in own.items():
        if state["asked"].get(name) != value:
            raise PlanError(
                "the state is of another schedule",
                why=f"{name} was {state['asked'].get(name)!r} there, and is {value!r} here",
                fix="make the Schedule with the options that it had",
            )
    plans = [Plan.from_json(text) for text in state["plans"]]
    if plans[: len(done)] != list(done):
        raise PlanError(
            "the model was pruned by other rounds already",
            fix="make the original model and the Schedule again, then load the state",
        )
    return plans


@all_or_nothing
def bring(
    model: nn.Module,
    parts: Sequence[Sequence[Plan]],
    forward_fn: ForwardFn | None,
    *,
    ema: Any = None,
) -> Snapshot:
    """Apply the rounds up to the last good model, and those after it; the model in between."""
    first, rest = parts
    if first:
        apply(reduce(Plan.then, first), model, ema=ema, forward_fn=forward_fn)
    between = Snapshot(model, None, ema)
    if rest:
        apply(reduce(Plan.then, rest), model, ema=ema, forward_fn=forward_fn)
    return between
