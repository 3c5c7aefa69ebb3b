"""What a cut takes away, given back as far as calibration data goes; every step is measured."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor, nn

from prunus.errors import ModelError, PlanError
from prunus.graph.coupling import CouplingGraph
from prunus.importance.batches import run_batch
from prunus.plans import Plan
from prunus.recovery.compensate import compensate
from prunus.recovery.norms import batch_norms, recalibrate
from prunus.recovery.repair import Method
from prunus.surgeon.apply import cut
from prunus.tracer.program import tensors_of
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
        ``"cut"``, ``"bias"``, ``"least squares"``, ``"least squares in sequence"`` or
        ``"batch norms"``.
    error
        √(Σ (y − y₀)² / Σ y₀²) over the outputs of the first batches after the step, with the
        dense model's y₀; NaN where the outputs can't be compared, or the step was not taken.
    kept
        Whether it stayed; ``"auto"`` takes back what makes the outputs worse.
    why
        Why a step was not kept, or what is to be minded of it.
    """

    name: str
    error: float
    kept: bool = True
    why: str = ""


@dataclass(frozen=True)
class Recovery:
    """The plan as it was applied (with biases that layers got), the steps, and the way back."""

    plan: Plan
    steps: tuple[Step, ...]
    undo: Callable[[], None] = field(repr=False, compare=False)


def cut_and_recover(
    model: nn.Module,
    plan: Plan,
    graph: CouplingGraph | None,
    data: Iterable[Any] | None,
    *,
    method: Recover = "auto",
    looked_at: Sequence[Any] = (),
    new_biases: bool = True,
    progress: Progress | None = None,
) -> Recovery:
    """Cut the model and repair it with the data; in place, either as a whole or not at all.

    Parameters
    ----------
    model, plan, graph, new_biases
        See :func:`~prunus.recovery.compensate.compensate`.
    data
        Calibration batches, which are read several times; without them the model is only cut.
    method
        ``"recalibrate"`` measures batch norms again; ``"bias"`` and ``"least_squares"``
        compensate, and ``"sequential"`` does with ``sequential=True``, which measures batch norms
        on the way; ``"auto"`` does least squares, then batch norms, and keeps of either what brings
        the outputs nearer to those of the dense model.
    looked_at
        Batches on which the outputs are compared.

    Raises
    ------
    DataError, ModelError, PlanError, ApplyError
        As from what it calls; the model is then whole.
    """
    check_recovery(method)
    if data is None or method == "none":
        return Recovery(plan, (), cut(plan, model))
    bench = _Bench(model, data, looked_at, answers_of(model, looked_at), progress)
    undo = cut(plan, model)
    try:
        steps = [Step("cut", bench.distance())]
        if method != "recalibrate":
            undo()
            undo = _nothing
            kind: Method = "bias" if method == "bias" else "least_squares"
            limit = steps[0].error if method == "auto" else None
            options: Any = {"method": kind, "new_biases": new_biases}
            if method == "sequential":
                options["sequential"] = True
            plan, undo, step = bench.compensate(plan, graph, limit, **options)
            steps.append(step)
        if method in ("auto", "recalibrate") and batch_norms(model):
            before = next(step.error for step in reversed(steps) if step.kept)
            steps.append(bench.settle(before if method == "auto" else None))
    except BaseException:
        undo()
        raise
    return Recovery(plan, tuple(steps), undo)


def check_recovery(method: str) -> None:
    """Refuse a recovery that there is not."""
    if method not in get_args(Recover):
        raise PlanError(
            f"no recovery is called {method!r}",
            why=f"known are {', '.join(get_args(Recover))}",
            fix='recover="auto"',
        )


@dataclass(frozen=True)
class _Bench:
    """A model under repair, with what the dense one answered to the batches that are looked at."""

    model: nn.Module
    data: Iterable[Any]
    looked_at: Sequence[Any]
    dense: Sequence[dict[str, Tensor]]
    progress: Progress | None

    def compensate(
        self, plan: Plan, graph: CouplingGraph | None, limit: float | None, **options: Any
    ) -> tuple[Plan, Callable[[], None], Step]:
        """Compensate the whole model; with a limit, only cut it where that can't be or is worse."""
        name = "bias" if options["method"] == "bias" else "least squares"
        name += " in sequence" if options.get("sequential") else ""
        count = self._counting(name)
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                done = compensate(self.model, plan, graph, self.data, progress=count, **options)
        except ModelError as error:
            if limit is None:
                raise
            return plan, cut(plan, self.model), Step(name, math.nan, False, error.what)
        found = self.distance()
        if limit is None or not found > limit:
            minded = "; ".join(str(one.message) for one in told)
            return done.plan, done.undo, Step(name, found, why=minded)
        done.undo()
        return plan, cut(plan, self.model), Step(name, found, False, WORSE)

    def settle(self, limit: float | None) -> Step:
        """Measure batch norms again; as they were where that is worse than the limit."""
        name = "batch norms"
        norms = batch_norms(self.model)
        saved = [{key: buffer.clone() for key, buffer in norm.named_buffers()} for norm in norms]
        recalibrate(self.model, self.data, progress=self._counting(name))
        found = self.distance()
        if limit is None or not found > limit:
            return Step(name, found)
        for norm, buffers in zip(norms, saved, strict=True):
            for key, buffer in norm.named_buffers():
                buffer.copy_(buffers[key])
        return Step(name, found, False, WORSE)

    def distance(self) -> float:
        """How far the outputs are from the dense ones, relative to these; NaN if none compare."""
        return distance(self.dense, answers_of(self.model, self.looked_at))

    def _counting(self, name: str) -> Callable[[int], None] | None:
        tell = self.progress
        return None if tell is None else lambda batches: tell(name, batches)


Answers = Sequence[Mapping[str, Tensor]]
"""Outputs by name, batch by batch."""


def answers_of(model: nn.Module, batches: Iterable[Any]) -> list[dict[str, Tensor]]:
    """What a model answers to batches, in eval mode; outputs of fractions alone."""
    found = []
    with quiet_run(model):
        for batch in batches:
            answer = tensors_of(run_batch(model, batch))
            found.append({name: t.detach().clone() for name, t in answer if t.is_floating_point()})
    return found


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


def _nothing() -> None:
    """What is undone where nothing was done."""
