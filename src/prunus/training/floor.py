"""The least value of a metric, and the last model that reached it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import PlanError
from prunus.graph.program import state_of
from prunus.surgeon.snapshot import Snapshot, twins_of
from prunus.tracer.quiet import same_modes

Evaluate = Callable[[nn.Module], float]
"""A metric of a model, higher is better."""


@dataclass(frozen=True)
class Floor:
    """A metric and its least value."""

    evaluate: Evaluate
    least: float

    def measure(self, model: nn.Module) -> float:
        """The metric; train and eval modes are as before when it returns."""
        with same_modes(model.modules()):
            found: Any = self.evaluate(model)
        try:
            value = float(found)
        except (TypeError, ValueError, RuntimeError):
            value = math.nan
        if math.isnan(value):
            raise PlanError(f"evaluate= returned {found!r}", fix="return a number, as 0.93")
        return value


def check_floor(floor: Any, evaluate: Any) -> Floor | None:
    """The floor that is asked for, in either spelling; refused if it is none."""
    if isinstance(floor, tuple) and len(floor) == 2 and evaluate is None:
        evaluate, floor = floor
    if floor is None and evaluate is None:
        return None
    number = isinstance(floor, Real) and not isinstance(floor, bool)
    if not number or not callable(evaluate):
        raise PlanError(
            f"floor={floor!r} beside evaluate={evaluate!r} is no floor",
            why="it is a function of the model and the least value that it may return",
            fix="give floor=(evaluate, 0.9), or floor=0.9 and evaluate=",
        )
    return Floor(evaluate, float(floor))


@dataclass(frozen=True)
class Good:
    """A model that reached the floor, as it was before the next round.

    Attributes
    ----------
    before
        Its shapes and attributes, and those of its average.
    values, optimizer
        Tensors by name, of the model and of averaged twins, copied, since training writes into
        those that are not cut; the optimizer's ``state_dict``, if there is one.
    round, plans
        How many rounds, and plans of them, it has behind it.
    """

    before: Snapshot
    values: Sequence[Mapping[str, Tensor]]
    optimizer: Any
    round: int
    plans: int

    @classmethod
    def of(cls, model: nn.Module, optimizer: Any, ema: Any, round: int, plans: int) -> Good:
        values = [
            {name: tensor.detach().clone() for name, tensor in state_of(one)[0].items()}
            for one in (model, *twins_of(model, ema))
        ]
        state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
        return cls(Snapshot(model, None, ema), values, state, round, plans)

    def restore(self, model: nn.Module, optimizer: Any, ema: Any) -> None:
        """Put it back in place; modes, and options of the optimizer, are those of now.

        Raises
        ------
        PlanError
            If there is an average now, and none was known of then; nothing was changed.
        """
        models = (model, *twins_of(model, ema))
        if len(models) != len(self.values):
            raise PlanError(
                "the last good model can't be put back: ema= was given only before or after it",
                why="both are put back together",
                fix="give ema= to every step(), and to load_state_dict()",
            )
        with same_modes([module for one in models for module in one.modules()]):
            self.before.restore()
        with torch.no_grad():
            for one, values in zip(models, self.values, strict=True):
                for name, tensor in state_of(one)[0].items():
                    if tensor.is_leaf:
                        tensor.grad = None
                    tensor.copy_(values[name])
        if optimizer is not None and self.optimizer is not None:
            options = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({**self.optimizer, "param_groups": options})
