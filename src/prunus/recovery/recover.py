"""What a cut takes away, given back as far as calibration data goes; every step is measured."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from prunus.calibration.batches import Batches, run_all
from prunus.calibration.ranks import share_weights, sum_over_ranks
from prunus.calibration.statistics import Statistics, Wanted, gather
from prunus.errors import DataError, ModelError, PlanError
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.recovery.compensate import Compensation, covers, cut_and_compensate, trace_again
from prunus.recovery.layer_norms import Correction, correct_norms, corrections_of, unseen, watching
from prunus.recovery.least_squares import Method, Options
from prunus.recovery.norms import batch_norms, recalibrate
from prunus.recovery.refresh import (
    answer_to,
    look,
    lost_means,
    move_statistics,
    moves_of,
    random_calls,
    take_statistics,
)
from prunus.surgeon.apply import cut
from prunus.surgeon.depth import without_blocks
from prunus.surgeon.snapshot import Snapshot
from prunus.tracer.trace import quiet_run

Recover = Literal["auto", "none", "recalibrate", "bias", "least_squares", "sequential"]

LOOKED_AT = 4
"""Batches on which the outputs are compared with those of the dense model: as many at most, and of
several batches half.
"""

WORSE = "worse than without"


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
        Whether it was kept; ``"auto"`` takes back what makes the outputs worse.
    why
        Why a step was not kept, or what to be aware of.
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
    statistics: Statistics | None = None,
    method: Recover = "auto",
    new_biases: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    check: bool = True,
    seed: int = 0,
) -> tuple[Plan, tuple[Step, ...]]:
    """Cut the model and repair it with the data, in place; who calls it puts it back on an error.

    Parameters
    ----------
    model, plan, new_biases, optimizer
        See :func:`~prunus.recovery.compensate.compensate`.
    graph
        Of the model without the blocks to drop; without it the model is traced again.
    data
        Calibration batches.  Without them the model is only cut, but by ``"auto"`` its batch norms
        follow in closed form and by random inputs of the traced shapes
        (:mod:`prunus.recovery.refresh`), where that brings the outputs on these nearer.
    statistics
        Of the dense model, with this graph; what they lack is collected.
    method
        ``"recalibrate"`` measures batch norms again; ``"bias"`` and ``"least_squares"``
        compensate, and ``"sequential"`` fits layer after layer, which measures batch norms
        on the way; ``"auto"`` does least squares, corrects norms over axes that lost positions
        (:mod:`prunus.recovery.layer_norms`), then measures batch norms, and keeps of these what
        brings the outputs nearer to those of the dense model; least squares also where they do
        so only once the norms are corrected.
    check
        As of :func:`prunus.apply`; after a plan was verified it says nothing new.
    seed
        Of the random inputs.

    Notes
    -----
    In a process group errors are summed over all processes, so that they keep the same steps, and
    all get the weights of rank 0.

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
        return plan, _cut_and_refresh(model, plan, graph, only_cut, seed)
    if data is None or method == "none":
        only_cut()
        return plan, ()
    data = Batches(data)
    if method == "recalibrate":
        graph = None
    elif graph is None:
        with without_blocks(model, plan.drops):
            graph = trace_again(model, plan)
    seen = _see(model, plan, graph, data, statistics, method)
    bench = _Bench(model, data, seen, only_cut)
    dense = Snapshot(model, optimizer)
    only_cut()
    steps = [Step("cut", bench.distance())]
    if graph is not None:
        dense.restore()
        fit = partial(
            cut_and_compensate,
            *(model, plan, graph, data, seen.statistics),
            Options(_FITS[method][0], new_biases=new_biases),
            optimizer=optimizer,
            check=check,
        )
        limit = steps[0].error if method == "auto" else None
        plan, step = bench.compensate(plan, fit, _FITS[method][1], limit, dense)
        steps.append(step)
    steps += bench.settle_norms(method, _left(steps))
    share_weights(model)
    return plan, tuple(steps)


_FITS: Mapping[Recover, tuple[Method, str]] = {
    "auto": ("least_squares", "least squares"),
    "least_squares": ("least_squares", "least squares"),
    "bias": ("bias", "bias"),
    "sequential": ("sequential", "least squares in sequence"),
}
"""Recoveries that fit weights: by which method, and the name of that step."""


class _Seen(NamedTuple):
    """What the dense model showed.

    Attributes
    ----------
    answers
        Its outputs on the batches that are looked at.
    statistics
        What weights are fitted to; None where nothing usable was collected yet.
    norms
        How norms have to change that the plan shortens.
    why
        Why no weights can be fitted, where ``"auto"`` does without.
    """

    answers: Answers
    statistics: Statistics | None
    norms: tuple[Correction, ...]
    why: str = ""


def _see(
    model: nn.Module,
    plan: Plan,
    graph: CouplingGraph | None,
    data: Batches,
    statistics: Statistics | None,
    method: Recover,
) -> _Seen:
    """Run the dense model over the data once, or not even that, for all that is read of it."""
    looked_at, why = data.first(LOOKED_AT), ""
    answers: list[Answers] = [answers_of(model, looked_at)] if plan.drops else []
    watched = plan if method == "auto" else None
    with without_blocks(model, plan.drops), watching(model, watched) as watches:
        if statistics is not None:
            answers.append(statistics.outputs)
        if graph is None or statistics is None or not covers(statistics, graph, plan.widths):
            statistics, why = _collect(model, plan, graph, data, method, len(looked_at))
            answers.append(statistics.outputs if statistics else ())
        if unseen(watches):
            with quiet_run(model):
                answers.append(run_all(model, data, keep=len(looked_at)))
    found = next(filter(None, answers), None) or answers_of(model, looked_at)
    return _Seen(found, statistics, corrections_of(watches), why)


def _collect(
    model: nn.Module,
    plan: Plan,
    graph: CouplingGraph | None,
    data: Batches,
    method: Recover,
    outputs: int,
) -> tuple[Statistics | None, str]:
    """What weights are fitted to, if any are at once; or why ``"auto"`` has to do without."""
    if graph is None or method == "sequential":
        return None, ""
    wanted = Wanted(frozenset({"second_moment"}), plan=plan.widths, outputs=outputs)
    try:
        return gather(model, graph, data, wanted), ""
    except ModelError as error:
        if method != "auto":
            raise
        return None, error.what


def _cut_and_refresh(
    model: nn.Module,
    plan: Plan,
    graph: CouplingGraph | None,
    only_cut: Callable[[], None],
    seed: int,
) -> tuple[Step, ...]:
    """Cut the model, and let its batch norms follow without data."""
    calls = random_calls(plan, model, seed=seed) if batch_norms(model) else []
    dense, lost = None, {}
    if calls:
        with suppress(Exception):  # a model's code may refuse random values with any error
            lost = lost_means(graph, model, plan) if graph and not plan.drops else {}
            dense = look(model, calls)
    only_cut()
    if dense is None:
        return ()
    moves = moves_of(model, plan, dense.runs, look(model, calls).runs, lost)
    with quiet_run(model):  # which puts the statistics back
        take_statistics(model, plan, dense.statistics)
        before = distance([dense.answer], [answer_to(model, calls[-1])])
        move_statistics(moves)
        after = distance([dense.answer], [answer_to(model, calls[-1])])
    if math.isnan(before):
        return (Step("cut", before),)
    kept = _nearer(after, before)
    if kept:
        move_statistics(moves)
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
    """A model under repair, with what the dense one showed."""

    model: nn.Module
    data: Batches
    seen: _Seen
    only_cut: Callable[[], None]

    def compensate(
        self,
        plan: Plan,
        compensate: Callable[[], Compensation],
        name: str,
        limit: float | None,
        dense: Snapshot,
    ) -> tuple[Plan, Step]:
        """Compensate the dense model; with a limit, only cut it where that can't be or is worse."""
        if self.seen.why:
            self.only_cut()
            return plan, Step(name, math.nan, False, self.seen.why)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            done = compensate()
        found = self.distance()
        if _nearer(found, limit) or _nearer(self._corrected(), limit):
            warned = "; ".join(str(one.message) for one in caught)
            return done.plan, Step(name, found, why=warned)
        dense.restore()
        self.only_cut()
        return plan, Step(name, found, False, WORSE)

    def settle_norms(self, method: Recover, error: float) -> Iterator[Step]:
        """Correct norms over shortened axes, and measure batch norms again."""
        if self.seen.norms:
            step = self.correct(error)
            error = step.error if step.kept else error
            yield step
        if method in ("auto", "recalibrate") and batch_norms(self.model):
            yield self.settle(error if method == "auto" else None)

    def correct(self, limit: float) -> Step:
        """Correct norms over shortened axes; as they were where that is worse than the limit."""
        return self._try("norms", self._correct, limit)

    def _corrected(self) -> float:
        """How far off the outputs would be with the norms corrected.

        What was fitted behind a norm expects the outputs that it has then, and may be worse than
        a mere cut before.
        """
        if not self.seen.norms:
            return math.inf
        before = Snapshot(self.model)
        self._correct()
        found = self.distance()
        before.restore()
        return found

    def _correct(self) -> None:
        correct_norms(self.model, self.seen.norms)

    def settle(self, limit: float | None) -> Step:
        """Measure batch norms again; as they were where that is worse than the limit."""
        name = "batch norms"

        def measure() -> None:
            recalibrate(self.model, self.data)

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
        wanted = self.seen.answers
        found = answers_of(self.model, self.data.first(LOOKED_AT))
        return distance(wanted, found, everywhere=True)


def _nearer(found: float, limit: float | None) -> bool:
    """Whether outputs are as near as before, or nobody asks, or nothing could be compared."""
    return limit is None or math.isnan(limit) or found <= limit


def _left(steps: Sequence[Step]) -> float:
    """The error after the last step that was kept."""
    return next(step.error for step in reversed(steps) if step.kept)


Answers = Sequence[Mapping[str, Tensor]]
"""Outputs by name, batch by batch."""


def answers_of(model: nn.Module, batches: Sequence[Any]) -> list[dict[str, Tensor]]:
    """What a model answers to batches, in eval mode; outputs of fractions alone."""
    with quiet_run(model):
        return run_all(model, batches, keep=len(batches))


def distance(wanted: Answers, found: Answers, *, everywhere: bool = False) -> float:
    """√(Σ (y − y₀)² / Σ y₀²) over all outputs that both have; NaN where there is none.

    With ``everywhere``, over those of all processes.
    """
    missed = whole = 0.0
    for before, after in zip(wanted, found, strict=True):
        for name, dense in before.items():
            smaller = after.get(name)
            if smaller is not None and smaller.shape == dense.shape:
                missed += float((smaller.double() - dense.double()).square().sum())
                whole += float(dense.double().square().sum())
    if everywhere:
        missed, whole = sum_over_ranks([missed, whole])
    return math.sqrt(missed / whole) if whole > 0 else math.nan
