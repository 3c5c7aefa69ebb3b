"""Pruning on a schedule while a model trains: one object that the training loop steps.

The model is traced once.  Before each round the graph of the model that is left is derived from
that of the original (:mod:`prunus.training.live`), a plan is made on it, and applied; the plans of
all rounds compose into one for the original model, which is what a checkpoint keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from prunus.calibration.batches import Batches
from prunus.calibration.statistics import Wanted, gather
from prunus.errors import PlanError
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.program import state_of
from prunus.importance import needs_of
from prunus.planner.filters import inside
from prunus.planner.option_values import check_count, takes_options
from prunus.planner.options import PlanKeywords, PlanOptions
from prunus.planner.planning import plan_verified
from prunus.planner.widths import plan_widths
from prunus.recovery import Recover, check_recovery
from prunus.surgeon.apply import check_model
from prunus.tracer.forward_fn import ForwardFn, entered_by
from prunus.tracer.inputs import positional
from prunus.tracer.trace import trace
from prunus.tracer.wrappers import unwrapped
from prunus.training.floor import Evaluate, Good, check_floor
from prunus.training.live import graph_after
from prunus.training.request import check_progress, check_span, floors_of, refuse_options
from prunus.training.resume import VERSION, bring, read_plans
from prunus.training.rounds import Round, cut_round
from prunus.training.shapes import Shape, bound_after, check_shape

if TYPE_CHECKING:
    from typing_extensions import Unpack

_LATE = 1e-9
"""By how much a progress may miss the moment of a round: 0.1 + 0.2 is 0.3 as well."""


class Schedule:
    """Prunes a model in rounds while it trains; the training loop calls :meth:`step`.

    Parameters
    ----------
    model
        The original model; of a wrapper the module inside.  It is traced here, once.
    inputs
        Example inputs for its forward: a tensor, a tuple, or a mapping of keyword arguments.
    steps
        How many rounds there are (1 for ``shape="one_shot"``).
    shape
        How the removal is shared out over the rounds: ``"cubic"`` (most of it first; Zhu & Gupta,
        2017), ``"linear"``, ``"geometric"`` (every round leaves the same part of the cost),
        ``"one_shot"``, or a function of the share of the rounds, in (0, 1], that returns the share
        of the removal that is done by then, 1 at the end.
    span
        The progress at which the first round is due, and the last one; others are evenly spaced
        between.  What is left of the training after it repairs the model.
    recover
        As for :func:`prunus.shrink`, in each round; no layer gets a bias.
    floor
        Least value of a metric: ``(evaluate, 0.9)``, or ``0.9`` beside ``evaluate=``, a function of
        the model, higher is better.  It is asked before every round, and at progress 1; below the
        floor, the model as it was before the last round is put back (weights, optimizer state and
        shapes), and the schedule ends.  The first round waits until the original model reaches
        the floor.
    verified
        Verify at once, on a copy, a plan for the whole budget; groups that verification rejects
        are kept whole in all rounds.
    forward_fn
        What is run in place of the forward, as in :func:`prunus.trace`.
    **options
        ``budget`` is of the last round, in fractions of the original model; ``max_ratio`` and
        ``min_width`` are of the original as well.  ``ratio``, ``ratios``, ``remove``, ``drop``,
        ``statistics`` and a bound on latency are refused.

    Attributes
    ----------
    plan
        All rounds so far as one plan for the original model.
    graph
        The coupling graph of the original model.
    held
        Groups that are kept whole since verification rejected them, with the reason.
    round
        How many rounds have been done.
    stopped
        Whether the floor has ended it.

    Raises
    ------
    PlanError, BudgetError, DataError, VerifyError
        As from :func:`prunus.shrink`, at once, not in the middle of a training.

    Examples
    --------
    >>> import prunus, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> schedule = Schedule(model, torch.randn(2, 8), budget=prunus.Budget(macs=0.5), steps=2)
    >>> for epoch in range(4):
    ...     done = schedule.step(epoch / 4)  # and train an epoch
    ...     if done:
    ...         print(done.number, model[0].out_features)
    1 18
    2 16
    """

    @takes_options(PlanOptions)
    def __init__(
        self,
        model: nn.Module,
        inputs: Any = (),
        *,
        steps: int = 5,
        shape: Shape = "cubic",
        span: tuple[float, float] = (0.0, 0.75),
        recover: Recover = "none",
        floor: float | tuple[Evaluate, float] | None = None,
        evaluate: Evaluate | None = None,
        verified: bool = True,
        forward_fn: ForwardFn | None = None,
        **options: Unpack[PlanKeywords],
    ) -> None:
        asked = PlanOptions(**options)
        asked.check()
        refuse_options(asked)
        check_count("steps", steps)
        self.steps = 1 if shape == "one_shot" else steps
        check_shape(shape, self.steps)
        check_recovery(recover, asked.data)
        self.shape, self.span, self._recover = shape, check_span(span), recover
        self._floor = check_floor(floor, evaluate)
        self.model = unwrapped(model)
        args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (positional(inputs), {})
        self._forward_fn = forward_fn
        self.held: dict[str, str] = {}
        with entered_by(self.model, forward_fn):
            self.graph = trace(self.model, args, kwargs)
            if verified:
                trial = replace(asked, importance="l2", data=None, loss=None)
                found = plan_verified(
                    *(self.graph, self.model, args, dict(kwargs), trial), each_group=False
                )
                self.held = found.held
        if asked.data is not None and (needs_of(asked.importance) or recover != "none"):
            asked = replace(asked, data=Batches(asked.data, asked.samples))
        self._asked = asked
        self._plans: list[Plan] = []
        self.round, self.stopped = 0, False
        self._good: Good | None = None

    @property
    def plan(self) -> Plan:
        """All rounds so far as one plan for the original model."""
        if not self._plans:
            origin = {"traced": self.graph.traced}
            return Plan.from_mask(self.graph, self.graph.all_kept, origin=origin)
        return reduce(Plan.then, self._plans)

    def step(
        self,
        progress: float,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        ema: Any = None,
        scheduler: Any = None,
    ) -> Round | None:
        """Prune if a round is due; call it after every epoch, or as often as you like.

        Where several rounds are due, the last of them is done at once.  On an error the model and
        the optimizer are as before the call.

        Parameters
        ----------
        progress
            How much of the training is done, from 0 to 1.
        optimizer, ema, scheduler
            Cut along, as by :func:`prunus.apply`.

        Returns
        -------
        Round or None
            What was done; None if no round is due.

        Raises
        ------
        PlanError
            If progress is outside 0 … 1, or the model was cut by something else since.
        """
        check_progress(progress)
        due = self._due(progress)
        ends = progress >= 1 and self._good is not None
        if self.stopped or not (due > self.round or ends):
            return None
        metric = None
        if self._floor is not None:
            metric = self._floor.measure(self.model)
            if metric < self._floor.least:
                return self._below(metric, self._floor.least, optimizer, ema)
        if due <= self.round:
            self._good = None
            return None
        also = {"optimizer": optimizer, "ema": ema, "scheduler": scheduler}
        return self._prune(due, metric, {k: v for k, v in also.items() if v is not None})

    def _due(self, progress: float) -> int:
        """How many rounds should have been done by then."""
        first, last = self.span
        pause = (last - first) / max(self.steps - 1, 1)
        moments = (first + number * pause for number in range(self.steps))
        return sum(progress >= moment - _LATE for moment in moments)

    def _below(self, metric: float, least: float, optimizer: Any, ema: Any) -> Round:
        """Put the last good model back, if there is one; else wait for a first one."""
        why = f"the metric {metric:g} is below the floor {least:g}"
        good = self._good
        if good is None:
            return self._record(self.round, metric=metric, note=f"waiting: {why}")
        good.restore(self.model, optimizer, ema)
        del self._plans[good.plans :]
        undone, self.round, self.stopped, self._good = self.round, good.round, True, None
        note = f"stopped: {why}; the model before this round was put back"
        return self._record(undone, metric=metric, restored=True, note=note)

    def _prune(self, due: int, metric: float | None, also: Mapping[str, Any]) -> Round:
        """Do a round: plan on the graph of the model that is left, and cut it."""
        live = self._live()
        limits = {
            name: bound_after(self.shape, self.graph.cost(name), final, due, self.steps)
            for name, final in self._limits().items()
        }
        with entered_by(self.model, self._forward_fn):
            chosen = self._choose(live, limits)
        if not chosen.keep:
            self.round, self._good = due, None
            return self._record(due, metric=metric, note="removed nothing: the budget is met")
        good = None
        if self._floor is not None:
            beside = also.get("optimizer"), also.get("ema")
            good = Good.of(self.model, *beside, self.round, len(self._plans))
        graph = live if live is self.graph else None  # a derived one says nothing of views
        with entered_by(self.model, self._forward_fn):
            chosen, steps = cut_round(
                *(self.model, chosen, graph, self._asked.data, self._recover),
                seed=self._asked.seed,
                forward_fn=self._forward_fn,
                **also,
            )
        self._plans.append(chosen)
        self.round, self._good = due, good
        return self._record(due, chosen, metric=metric, recovery=steps)

    def _live(self) -> CouplingGraph:
        """The graph of the model that is left; refused if the model is another one by now."""
        live = self.graph
        if self._plans:
            keep = {axis: np.asarray(stay) for axis, stay in self.plan.keep.items()}
            live = graph_after(live, live.mask_from_positions(keep))
        shapes = {name: shape for name, shape in live.shapes.items() if name not in live.aliases}
        empty = Plan({}, shapes, origin={"traced": live.traced})
        check_model(empty, self.model, state_of(self.model)[0])
        return live

    def _limits(self) -> dict[str, int]:
        """The bounds of the last round."""
        budget, part = self._asked.budget, self._asked.part
        assert budget is not None, "checked at the start"
        return (budget if part is None else budget.of_part(part)).limits(self.graph)

    def _choose(self, live: CouplingGraph, limits: Mapping[str, int]) -> Plan:
        """The plan of a round, for the model that is left."""
        asked, graph = self._asked, inside(live, self._asked.part)
        needs = needs_of(asked.importance)
        if needs and asked.data is not None:
            wanted = Wanted(needs, asked.loss, seed=asked.seed)
            statistics = gather(self.model, graph, asked.data, wanted)
            asked = replace(asked, statistics=statistics)
        names = {group.name for group in graph.groups}
        least = {name: n for name, n in floors_of(self.graph, asked).items() if name in names}
        held = dict.fromkeys(asked.hold, "it is held") | self.held
        held = {name: why for name, why in held.items() if name in names}
        asked = replace(asked, min_width=least, max_ratio=1.0)
        return plan_widths(graph, self.model, asked, held, limits=limits)

    def _record(self, number: int, plan: Plan | None = None, **said: Any) -> Round:
        removed = sum(len(group.removed) for group in plan.groups) if plan else 0
        return Round(number, self.steps, removed, self.plan.cost(), plan, **said)

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint, which ``torch.load(…, weights_only=True)`` reads.

        The plans of the rounds, how many are done, PyTorch's random state, and with a floor the
        weights and optimizer state of the last good model.
        """
        good = self._good
        return {
            "version": VERSION,
            "asked": self._identity(),
            "plans": [plan.to_json() for plan in self._plans],
            "round": self.round,
            "stopped": self.stopped,
            "held": dict(self.held),
            "good": None
            if good is None
            else {
                "values": [dict(values) for values in good.values],
                "optimizer": good.optimizer,
                "round": good.round,
                "plans": good.plans,
            },
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: Mapping[str, Any], *, ema: Any = None) -> None:
        """Continue where :meth:`state_dict` was taken, and put PyTorch's random state back.

        A fresh original model is cut to the shapes of then, so that its own ``load_state_dict``
        fits next; make the optimizer before or after, and load its state last.  An average of the
        fresh model's weights is given as ``ema``, and cut along; or make it afterwards.

        Raises
        ------
        PlanError
            If the state is of another schedule, or the model was pruned otherwise already; nothing
            was changed.
        """
        plans = read_plans(state, self._identity(), self._plans)
        done = len(self._plans)
        good = state["good"]
        split = len(plans) if good is None else good["plans"]
        parts = [plans[done:split], plans[max(done, split) :]]
        known = self._good
        if done > split and (known is None or known.plans != split):
            raise PlanError(
                "the model was pruned by other rounds already",
                fix="make the original model and the Schedule again, then load the state",
            )
        before = bring(self.model, parts, forward_fn=self._forward_fn, ema=ema)
        if known is not None and done > split:
            before = known.before
        if good is not None:
            values = [{n: t.clone() for n, t in one.items()} for one in good["values"]]
            self._good = Good(before, values, good["optimizer"], good["round"], split)
        else:
            self._good = None
        self._plans, self.round, self.stopped = plans, state["round"], state["stopped"]
        self.held = dict(state["held"])
        torch.set_rng_state(state["random"].cpu())
        if state["random_cuda"] and torch.cuda.is_available():
            here = state["random_cuda"][: torch.cuda.device_count()]
            torch.cuda.set_rng_state_all([one.cpu() for one in here])

    def _identity(self) -> dict[str, Any]:
        """What has to be the same where a state is loaded."""
        budget = self._asked.budget
        return {
            "budget": {} if budget is None else budget.requested,
            "steps": self.steps,
            "shape": self.shape if isinstance(self.shape, str) else "a function",
            "span": list(self.span),
        }
