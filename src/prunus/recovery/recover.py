"""What a cut takes away, given back as far as calibration data goes; every step is measured."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from prunus.calibration.batches import run_batch
from prunus.errors import DataError, ModelError, PlanError
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.recovery.compensate import compensate
from prunus.recovery.layer_norms import Correction, correct_norms, measure_norms
from prunus.recovery.norms import batch_norms, recalibrate
from prunus.recovery.refit import Method
from prunus.recovery.refresh import (
    answer_to,
    fractions_of,
    look,
    move_statistics,
    random_calls,
    take_statistics,
)
from prunus.surgeon.apply import cut
from prunus.surgeon.snapshot import Snapshot
from prunus.tracer.trace import quiet_run

Recover = Literal["auto", "none", "recalibrate", "bias", "least_squares", "sequential"]

LOOKED_AT = 4
"""Batches on which the outputs are compared with those of the dense model."""

WORSE = "it made the outputs worse"

Progress = Callable[[str, int], None]
"""Called with the name of a step, and the number of batches done."""


@dataclass(frozen=True)
class Step:
    """One step of a recovery.

    Attributes
    ----------
    name
        ``"cut"``, ``"bias"``, ``"least squares"``, ``"least squares in sequence"``, ``"norms"``,
        ``"batch norms"`` or ``"batch norms (no data)"``.
    error
        √(Σ (y − y₀)² / Σ y₀²) over the outputs of the first batches after the step (without data,
        of a random input on which batch norms take its own statistics), with the dense model's
        y₀; NaN where the outputs can't be compared, or the step was not taken.
    kept
        Whether it stayed; ``"auto"`` takes back what makes the outputs worse.
    why
        Why a step was not kept, or what is to be minded of it.
    """

    name: str
    error: float
    kept: bool = True
    why: str = ""


def cut_and_recover(
    model: nn.Module,
    plan: Plan,
    graph: CouplingGraph | None,
    data: Iterable[Any] | None,
    *,
    method: Recover = "auto",
    looked_at: Sequence[Any] = (),
    new_biases: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    progress: Progress | None = None,
    check: bool = True,
    seed: int = 0,
) -> tuple[Plan, tuple[Step, ...]]:
    """Cut the model and repair it with the data, in place; who calls it puts it back on an error.

    Parameters
    ----------
    model, plan, graph, new_biases, optimizer
        See :func:`~prunus.recovery.compensate.compensate`.
    data
        Calibration batches, which are read several times.  Without them the model is only cut,
        but by ``"auto"`` its batch norms follow by random inputs of the traced shapes
        (:mod:`prunus.recovery.refresh`), where that brings the outputs on these nearer.
    method
        ``"recalibrate"`` measures batch norms again; ``"bias"`` and ``"least_squares"``
        compensate, and ``"sequential"`` does with ``sequential=True``, which measures batch norms
        on the way; ``"auto"`` does least squares, corrects norms over axes that lost positions
        (:mod:`prunus.recovery.layer_norms`), then measures batch norms, and keeps of these what
        brings the outputs nearer to those of the dense model; least squares also where they do
        so only once the norms are corrected.
    looked_at
        Batches on which the outputs are compared.
    check
        As of :func:`prunus.apply`; after a plan was verified it says nothing new.
    seed
        Of the random inputs.

    Returns
    -------
    plan, steps
        The plan as it was applied (with biases that layers got), and what each step brought.

    Raises
    ------
    DataError, ModelError, PlanError, ApplyError
        As from what it calls.
    """
    check_recovery(method, data)
    only_cut = partial(cut, plan, model, optimizer=optimizer, check=check)
    if data is None and method == "auto":
        return plan, _cut_and_refresh(model, plan, only_cut, seed)
    if data is None or method == "none":
        only_cut()
        return plan, ()
    dense = Snapshot(model, optimizer)
    tell = _counting(progress, "norms")
    norms = measure_norms(model, plan, data, progress=tell) if method == "auto" else ()
    answers = answers_of(model, looked_at)
    bench = _Bench(model, data, looked_at, answers, norms, progress, only_cut)
    only_cut()
    steps = [Step("cut", bench.distance())]
    if method != "recalibrate":
        dense.restore()
        kind: Method = "bias" if method == "bias" else "least_squares"
        limit = steps[0].error if method == "auto" else None
        options: Any = {"method": kind, "new_biases": new_biases, "optimizer": optimizer}
        if method == "sequential":
            options["sequential"] = True
        plan, step = bench.compensate(plan, graph, limit, dense, **options)
        steps.append(step)
    if norms:
        steps.append(bench.correct(_left(steps)))
    if method in ("auto", "recalibrate") and batch_norms(model):
        steps.append(bench.settle(_left(steps) if method == "auto" else None))
    return plan, tuple(steps)


def _cut_and_refresh(
    model: nn.Module, plan: Plan, only_cut: Callable[[], None], seed: int
) -> tuple[Step, ...]:
    """Cut the model, and let its batch norms follow without data."""
    calls = random_calls(plan, model, seed=seed) if batch_norms(model) else []
    dense = None
    if calls:
        with suppress(Exception):  # a model's code may refuse random values with any error
            dense = look(model, calls)
    only_cut()
    if dense is None:
        return ()
    follow = partial(move_statistics, model, plan, dense.moments, look(model, calls).moments)
    with quiet_run(model):  # which puts the statistics back
        take_statistics(model, plan, dense.statistics)
        before = distance([dense.answer], [answer_to(model, calls[-1])])
        follow()
        after = distance([dense.answer], [answer_to(model, calls[-1])])
    if math.isnan(before):
        return (Step("cut", before),)
    kept = _nearer(after, before)
    if kept:
        follow()
    step = Step("batch norms (no data)", after, kept, "" if kept else WORSE)
    return Step("cut", before), step


def check_recovery(method: str, data: Iterable[Any] | None) -> None:
    """Refuse a recovery that there is not, or that has nothing to read."""
    if method not in get_args(Recover):
        raise PlanError(
            f"no recovery is called {method!r}",
            why=f"known are {', '.join(get_args(Recover))}",
            fix='recover="auto"',
        )
    if data is None and method not in ("auto", "none"):
        raise DataError(
            f"recover={method!r} needs calibration data",
            why="it repairs the smaller model by what its layers read",
            fix='give data=loader, or leave it out: recover="auto" does what needs none',
        )


@dataclass(frozen=True)
class _Bench:
    """A model under repair, with what the dense one answered to the batches that are looked at,
    and what it said of the norms that the plan shortens."""

    model: nn.Module
    data: Iterable[Any]
    looked_at: Sequence[Any]
    dense: Sequence[dict[str, Tensor]]
    norms: Sequence[Correction]
    progress: Progress | None
    only_cut: Callable[[], None]

    def compensate(
        self,
        plan: Plan,
        graph: CouplingGraph | None,
        limit: float | None,
        dense: Snapshot,
        **options: Any,
    ) -> tuple[Plan, Step]:
        """Compensate the dense model; with a limit, only cut it where that can't be or is worse."""
        name = "bias" if options["method"] == "bias" else "least squares"
        name += " in sequence" if options.get("sequential") else ""
        count = _counting(self.progress, name)
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                done = compensate(*(self.model, plan, graph, self.data), progress=count, **options)
        except ModelError as error:
            if limit is None:
                raise
            self.only_cut()
            return plan, Step(name, math.nan, False, error.what)
        found = self.distance()
        if _nearer(found, limit) or _nearer(self._corrected(), limit):
            minded = "; ".join(str(one.message) for one in told)
            return done.plan, Step(name, found, why=minded)
        dense.restore()
        self.only_cut()
        return plan, Step(name, found, False, WORSE)

    def correct(self, limit: float) -> Step:
        """Correct norms over shortened axes; as they were where that is worse than the limit."""
        return self._try("norms", self._correct, limit)

    def _corrected(self) -> float:
        """How far off the outputs would be with the norms corrected.

        What was fitted behind a norm expects the outputs that it has then, and may be worse than
        a mere cut before.
        """
        if not self.norms:
            return math.inf
        before = Snapshot(self.model)
        self._correct()
        found = self.distance()
        before.restore()
        return found

    def _correct(self) -> None:
        correct_norms(self.model, self.norms)

    def settle(self, limit: float | None) -> Step:
        """Measure batch norms again; as they were where that is worse than the limit."""
        name = "batch norms"

        def measure() -> None:
            recalibrate(self.model, self.data, progress=_counting(self.progress, name))

        return self._try(name, measure, limit)

    def _try(self, name: str, change: Callable[[], None], limit: float | None) -> Step:
        """Change the model in place; with a limit, not where the outputs are farther off then."""
        before = Snapshot(self.model)
        change()
        found = self.distance()
        if _nearer(found, limit):
            return Step(name, found)
        before.restore()
        return Step(name, found, False, WORSE)

    def distance(self) -> float:
        """How far the outputs are from the dense ones, relative to these; NaN if none compare."""
        return distance(self.dense, answers_of(self.model, self.looked_at))


def _counting(tell: Progress | None, name: str) -> Callable[[int], None] | None:
    """What tells the batches of one step."""
    return None if tell is None else lambda batches: tell(name, batches)


def _nearer(found: float, limit: float | None) -> bool:
    """Whether outputs are as near as before, or nobody asks, or nothing could be compared."""
    return limit is None or math.isnan(limit) or found <= limit


def _left(steps: Sequence[Step]) -> float:
    """The error after the last step that was kept."""
    return next(step.error for step in reversed(steps) if step.kept)


Answers = Sequence[Mapping[str, Tensor]]
"""Outputs by name, batch by batch."""


def answers_of(model: nn.Module, batches: Iterable[Any]) -> list[dict[str, Tensor]]:
    """What a model answers to batches, in eval mode; outputs of fractions alone."""
    with quiet_run(model):
        return [fractions_of(run_batch(model, batch)) for batch in batches]


def distance(wanted: Answers, found: Answers) -> float:
    """√(Σ (y − y₀)² / Σ y₀²) over all outputs that both have; NaN where there is none."""
    missed = whole = 0.0
    for before, after in zip(wanted, found, strict=True):
        for name, dense in before.items():
            smaller = after.get(name)
            if smaller is not None and smaller.shape == dense.shape:
                missed += float((smaller.double() - dense.double()).square().sum())
                whole += float(dense.double().square().sum())
    return math.sqrt(missed / whole) if whole > 0 else math.nan
