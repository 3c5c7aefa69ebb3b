"""A latency budget, met by the clock: a bound on MACs and a multiple of widths, searched together.

What the widths of a model do to its time is not known before it is run: kernels take channels in
steps, and some operators hardly get faster.  So plans are made for bounds on MACs, a copy of the
model is cut by each and timed in turn with the dense one, and the bound is moved until the time
is the one that was asked for; once for each multiple of widths.  Of the plans that meet the time
the one is taken that costs the model least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

import torch
from torch import nn

from prunus.calibration.batches import Batches
from prunus.errors import BudgetError, PlanError
from prunus.graph.axis import Mask
from prunus.graph.budget import seconds
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.planner.allocate import Selection
from prunus.planner.clocks import Clock, Race
from prunus.planner.options import PlanOptions
from prunus.recovery import cut_and_recover
from prunus.tracer.copies import duplicate
from prunus.tracer.inputs import rebuild_inputs

MULTIPLES = (1, 8, 16, 32)
"""Of widths, where nobody says of what they are to be multiples."""

TOLERANCE = 0.02
"""How far the measured time may lie from the requested one, as a part of it."""

_STEPS = 8
"""Bounds on MACs that are tried at most for one multiple."""

_NARROW = 0.01
"""Bounds on MACs are not told apart more closely, as a part of them."""

_SHY = 0.15
"""How near to an end of the bracket the next bound may lie, as a part of it."""

_SAMPLES = 128
"""Of the calibration data, on which plans of different multiples are compared."""

Choose = Callable[[Mapping[str, int], int | None], Selection]
"""The units that are kept under bounds, with widths that are such multiples."""

Build = Callable[[Mask], Plan]
"""The plan that keeps these units."""


@dataclass(eq=False)
class Trial:
    """A plan that was cut and timed; the bound on MACs and the multiple that it was made for.

    ``error`` is that of the outputs on the data after repair, where it was compared.
    """

    selection: Selection
    plan: Plan
    macs: float
    multiple: int | None
    race: Race
    error: float | None = None

    @property
    def retained(self) -> float:
        """The part of all importance that is kept."""
        return self.selection.retained or 0.0

    @property
    def ratio(self) -> float:
        """The time as a part of the dense model's."""
        return self.race.ratio

    def record(self) -> dict[str, Any]:
        """What was measured, as plain data."""
        names = ("multiple", "macs", "ratio", "retained", "error")
        return {name: getattr(self, name) for name in names}


_Point = tuple[float, float | None]
"""An end of the bracket: the bound on MACs, and the time that it takes, where it is known."""


def meet_time(
    graph: CouplingGraph,
    model: nn.Module,
    asked: PlanOptions,
    limits: Mapping[str, int],
    choose: Choose,
    build: Build,
    multiples: Sequence[int | None],
) -> tuple[Selection, dict[str, Any]]:
    """The units that are kept for a budget of latency, and what the plan records of the search.

    Parameters
    ----------
    graph, model
        What was traced; the model is not modified, and never run: copies are.
    asked
        With the budget, and the data if there are any: of the plans that meet the time the one is
        taken whose outputs on the first of them, after repair, are nearest to the dense model's.
        Without data, it is the one that keeps the most importance.
    limits
        The other bounds of the budget, which hold for every plan that is tried.
    choose
        From bounds and a multiple to the units that are kept.
    build
        From these to a plan.
    multiples
        Of widths; None stands for what the caller's ``round_to`` says.

    Raises
    ------
    BudgetError
        If no plan is as fast as that; it says how fast the fastest is.
    PlanError
        If the traced inputs are not described, or the timer returns no time.
    """
    spec, budget = graph.traced.get("inputs"), asked.budget
    assert budget is not None
    if spec is None:
        raise PlanError(
            "there are no inputs to time the model with",
            why="those of its trace can't be described as plain data",
            fix="trace it with tensors, numbers and containers of them",
        )
    clock = Clock(budget.timer, model, rebuild_inputs(spec, model, seed=asked.seed))
    search = _Search(budget.latency, clock, limits, graph.cost("macs"), choose, build)
    for multiple in multiples:
        search.bisect(multiple)
    best = search.best_of_each()
    chosen = max(best, key=lambda trial: trial.retained)
    if asked.data is not None and len(best) > 1:
        batches = Batches(iter(asked.data), _SAMPLES)
        for trial in best:
            trial.error = _error(model, trial.plan, graph, batches, asked)
        if all(trial.error is not None for trial in best):
            chosen = min(best, key=lambda trial: trial.error or 0.0)
    return chosen.selection, search.record(chosen)


def _error(
    model: nn.Module, plan: Plan, graph: CouplingGraph, data: Batches, asked: PlanOptions
) -> float | None:
    """The error of the outputs of a copy that is cut and repaired; None where it is not finite."""
    _, steps = cut_and_recover(
        *(duplicate(model), plan, graph, data), statistics=asked.statistics, seed=asked.seed
    )
    error = [step.error for step in steps if step.kept][-1]
    return error if isfinite(error) else None


@dataclass
class _Search:
    """Plans that were cut and timed for bounds on MACs."""

    bound: float | str | None
    clock: Clock
    limits: Mapping[str, int]
    dense_macs: int
    choose: Choose
    build: Build
    trials: list[Trial] = field(default_factory=list)
    floors: BudgetError | None = None

    def best_of_each(self) -> list[Trial]:
        """Of each multiple the plan that meets the time and keeps the most, none twice.

        Raises
        ------
        BudgetError
            If none of any multiple meets it.
        """
        if not self.trials and self.floors is not None:
            raise self.floors  # no bound on MACs goes with the others
        best: dict[int | None, Trial] = {}
        for trial in filter(self._meets, self.trials):
            known = best.setdefault(trial.multiple, trial)
            best[trial.multiple] = max(known, trial, key=lambda one: (one.retained, -one.ratio))
        if not best:
            raise self._unreachable()
        found: dict[bytes, Trial] = {}
        for trial in best.values():
            found.setdefault(trial.selection.kept.tobytes(), trial)
        return list(found.values())

    def bisect(self, multiple: int | None) -> None:
        """Move the bound on MACs until the time is the requested one, or no other is left."""
        low: _Point = (0.0, None)
        high: _Point = (1.0, 1.0)
        share = self._first_guess()
        for _ in range(_STEPS):
            trial = self._try(share, multiple)
            if trial is None:
                low = share, None
            elif self._meets(trial) and (
                share >= 1 or trial.ratio >= self._wanted * (1 - TOLERANCE)
            ):
                return
            elif trial.ratio > self._wanted:
                high = share, trial.ratio
            else:
                low = share, trial.ratio
            if high[0] - low[0] < _NARROW * high[0]:
                return
            share = _between(low, high, self._wanted)

    def _first_guess(self) -> float:
        """The bound that came nearest with another multiple; at first, time as MACs."""
        if self.trials:
            return min(self.trials, key=lambda t: abs(t.ratio - self._wanted)).macs
        if self.limits or not isinstance(self.bound, float):
            return 1.0  # may be fast enough by the other bounds, or as it is
        return self.bound

    def _try(self, share: float, multiple: int | None) -> Trial | None:
        """Plan, cut and time; None where the floors don't allow the bound."""
        most = int(share * self.dense_macs)
        limits = {**self.limits, "macs": min(most, self.limits.get("macs", most))}
        try:
            chosen = self.choose(limits, multiple)
        except BudgetError as error:
            self.floors = error
            return None
        plan = self.build(chosen.kept)
        same = [t.race for t in self.trials if (t.selection.kept == chosen.kept).all()]
        wanted = self._wanted if self.trials else None
        race = same[0] if same else self.clock.compare(plan, wanted)
        trial = Trial(chosen, plan, share, multiple, race)
        self.trials.append(trial)
        return trial

    def _meets(self, trial: Trial) -> bool:
        return trial.ratio <= self._wanted * (1 + TOLERANCE)

    @property
    def _wanted(self) -> float:
        """The requested time as a part of the dense model's."""
        if not isinstance(self.bound, str):
            return float(self.bound or 1.0)
        return min(1.0, seconds(self.bound) / self._dense_seconds)

    @property
    def _dense_seconds(self) -> float:
        times = sorted(trial.race.dense for trial in self.trials)
        return times[len(times) // 2] if times else inf

    def record(self, chosen: Trial) -> dict[str, Any]:
        """What was measured, as plain data."""
        return {
            "clock": self.clock.name,
            "threads": torch.get_num_threads(),
            "dense_ms": 1e3 * chosen.race.dense,
            "rounds": chosen.race.rounds,
            "spread": chosen.race.spread,
            **chosen.record(),
            "trials": [trial.record() for trial in self.trials],
        }

    def _unreachable(self) -> BudgetError:
        fastest = min(self.trials, key=lambda trial: trial.ratio)
        dense_ms = 1e3 * self._dense_seconds
        floors = f"; {self.floors.what}; {self.floors.why}" if self.floors else ""
        return BudgetError(
            f"no plan takes {self._wanted:.1%} of the dense model's {dense_ms:.4g} ms",
            where=f"by the clock {self.clock.name}",
            why=f"the fastest of {len(self.trials)} plans takes {fastest.ratio:.1%}, "
            f"{dense_ms * fastest.ratio:.4g} ms ({_spell(fastest)}){floors}",
            fix="ask for no less than that, or lower the floors (max_ratio, min_width)",
        )


def _between(low: _Point, high: _Point, wanted: float) -> float:
    """The next bound to try, within the bracket."""
    (least, faster), (most, slower) = low, high
    width = most - least
    if faster is not None and slower is not None:
        guess = least + width * (wanted - faster) / max(slower - faster, 1e-9)
    elif least > 0 or slower is None:  # the floors stop it there
        guess = least + width / 2
    elif most < 1 and slower < 1:  # on the line through the dense model
        guess = most - (slower - wanted) * (1 - most) / (1 - slower)
    else:
        guess = most * wanted / slower
    return min(max(guess, least + _SHY * width), most - _SHY * width)


def _spell(trial: Trial) -> str:
    """What a trial was made for.

    >>> from types import SimpleNamespace as N
    >>> _spell(N(macs=0.625, multiple=8)), _spell(N(macs=0.5, multiple=1))
    ('at most 62.5% of the MACs, widths multiples of 8', 'at most 50.0% of the MACs')
    """
    widths = "" if trial.multiple in (None, 1) else f", widths multiples of {trial.multiple}"
    return f"at most {trial.macs:.1%} of the MACs{widths}"
