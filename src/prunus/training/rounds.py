"""One round of a schedule: what it did, and the cut with its recovery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunus.graph.coupling import CouplingGraph
from prunus.graph.plan_records import Cost
from prunus.graph.plans import Plan
from prunus.recovery import Recover, Step, cut_and_recover
from prunus.surgeon.apply import apply, cut_along
from prunus.surgeon.ema import Average, check_scheduler
from prunus.surgeon.snapshot import all_or_nothing
from prunus.tracer.forward_fn import ForwardFn


@dataclass(frozen=True)
class Round:
    """What a step of a schedule did.

    Attributes
    ----------
    number, steps
        The round that was done, from 1 on, of so many; the last one where several were due.
    removed
        Units that this round removed.
    costs
        Every cost of the original model, and of the model now.
    plan
        What was applied in this round, for the model before it; None if nothing was removed.
    metric
        What the floor's function returned before this round; None where it wasn't asked.
    restored
        Whether the metric was below the floor, and the last model above it was put back.
    recovery
        What each step of the recovery brought.
    note
        Why nothing was removed, if nothing was.
    """

    number: int
    steps: int
    removed: int
    costs: Mapping[str, Cost] = field(default_factory=dict)
    plan: Plan | None = None
    metric: float | None = None
    restored: bool = False
    recovery: tuple[Step, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        said = self.note or f"removed {self.removed} unit{'s' if self.removed > 1 else ''}"
        shares = ", ".join(f"{name} {cost.share:.1%}" for name, cost in self.costs.items())
        return f"round {self.number} of {self.steps}: {said} ({shares})"


@all_or_nothing
def cut_round(
    model: nn.Module,
    plan: Plan,
    graph: CouplingGraph | None,
    data: Any,
    recover: Recover,
    *,
    seed: int,
    forward_fn: ForwardFn | None,
    optimizer: torch.optim.Optimizer | None = None,
    ema: Any = None,
    scheduler: Any = None,
) -> tuple[Plan, tuple[Step, ...]]:
    """Apply the plan of a round, and recover; all of it or nothing."""
    if recover == "none":
        also = {"optimizer": optimizer, "ema": ema, "scheduler": scheduler}
        apply(plan, model, forward_fn=forward_fn, **also)
        return plan, ()
    check_scheduler(scheduler, optimizer)
    average = Average(model, ema, repaired=True)
    done, steps = cut_and_recover(
        *(model, plan, graph, data),
        method=recover,
        new_biases=False,  # no optimizer would train them
        optimizer=optimizer,
        seed=seed,
    )
    cut_along(done, average)
    return done, steps
