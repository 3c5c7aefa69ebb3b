"""Ratios that meet a budget: from a table of sensitivities, or searched against a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from prunus.errors import BudgetError, PlanError, checks_options, require
from prunus.graph.budget import Budget
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.progress import Progress, following
from prunus.planner.culprits import tell_pins
from prunus.planner.filters import excluded_groups
from prunus.planner.option_values import takes_options
from prunus.planner.options import ScoreKeywords, ScoreOptions
from prunus.planner.search.experiment import Experiment, Metric, check_ratios
from prunus.planner.search.sensitivity import Sensitivity

if TYPE_CHECKING:
    from typing_extensions import Unpack

_HALVINGS = 14
"""Of the interval in which the least ratios are sought: to 1/16384 of it."""


@checks_options
@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes
    ----------
    plan
        The best plan, within the budget.
    ratios
        The share of its units that every group of the search loses in it.
    value
        The metric of the masked model under this plan.
    trials
        Trials of the study that have a value, those of other processes included.
    """

    plan: Plan
    ratios: Mapping[str, float]
    value: float
    trials: int


@takes_options(ScoreOptions)
def plan_by_sensitivity(
    table: Sensitivity,
    graph: CouplingGraph,
    model: nn.Module,
    budget: Budget | None = None,
    **options: Unpack[ScoreKeywords],
) -> Plan:
    """The plan within a budget in which every group costs the metric about as little as any other.

    Each group loses what :meth:`Sensitivity.ratios_at` says of one loss of the metric, the same for
    all groups and the least with which the budget is met.  (That loss is of one group alone; all
    together cost more.)  Without a budget each loses what the table has as tolerated.

    Parameters
    ----------
    table
        What :func:`prunus.planner.search.sensitivity` measured on this model.
    budget
        As of :func:`prunus.plan`.
    **options

    Raises
    ------
    BudgetError
        If the table's largest ratios don't meet it; the message says what they reach.
    PlanError
        If the table is of a model with other groups, or there is neither a budget nor anything
        tolerated.
    """
    names = {group.name: group.size for group in graph.groups}
    strange = [name for name, size in table.sizes.items() if names.get(name) != size]
    if strange:
        raise PlanError(
            f"the table speaks of {strange[0]}, of {table.sizes[strange[0]]} units",
            why="the model has no such group: the table is another model's",
            fix="measure it again: prunus.planner.search.sensitivity(graph, model, metric)",
        )
    asked = ScoreOptions(**options)
    experiment = Experiment.of(graph, model, asked)
    left_out = excluded_groups(graph, asked.include, asked.exclude)
    sizes = {name: size for name, size in table.sizes.items() if name not in left_out}
    if budget is not None:
        table = replace(table, sizes=sizes)
        most = table.dense - table.least
        return experiment.plan(_meet(experiment, budget, lambda t: table.ratios_at(t * most)))
    if not table.tolerated:
        raise PlanError(
            "nothing says how much to remove",
            why="there is no budget, and the table has no tolerated shares",
            fix="give a budget, or measure the table with a tolerance",
        )
    return experiment.plan({name: s for name, s in table.tolerated.items() if name in sizes})


@takes_options(ScoreOptions)
def search_ratios(
    graph: CouplingGraph,
    model: nn.Module,
    metric: Metric,
    *,
    budget: Budget,
    trials: int = 50,
    max_ratio: float = 0.9,
    storage: Any = None,
    study: str = "prunus",
    progress: Progress | None = None,
    **options: Unpack[ScoreKeywords],
) -> Found:
    """Search the groups' ratios for the best metric within a budget, with Optuna.

    Every trial proposes how much the groups lose in proportion to one another, and takes as little
    as meets the budget; the metric is that of the masked model.  The first trial is of equal
    ratios.  Needs the extra ``search``.

    Parameters
    ----------
    graph, model, metric
        As of :func:`sensitivity`: of the metric more is better.
    budget
        As of :func:`prunus.plan`.
    trials
        How many trials this process adds.
    max_ratio
        The largest share that a group may lose, in (0, 1).
    storage, study
        Where Optuna keeps the study, and its name: with a URL (``"sqlite:///study.db"``) or a
        storage of Optuna a search goes on where it was, and several processes work on it at once.
        Give each process another ``seed``, or they propose the same.
    progress
        Called with what a trial gave, in words, the number of trials done, and how many there are.
    **options

    Raises
    ------
    BudgetError
        If ``max_ratio`` of every group does not meet the budget.
    DataError
        If the metric returns something else than a finite number, or the importance lacks data.
    PlanError
        If the number of trials or ``max_ratio`` is none, or the study is that of another model,
        budget or importance.
    MissingExtraError
        Without Optuna; the message names the extra.
    """
    optuna = require("optuna", "search")
    if trials < 1:
        raise PlanError(f"trials must be a positive integer, got {trials!r}")
    (most,) = check_ratios([max_ratio])
    experiment = Experiment.of(graph, model, ScoreOptions(**options))
    tops = experiment.rows([most * part for part in (1.0, 0.75, 0.5, 0.25)])
    key = f"{experiment.fingerprint()} {budget.requested} {max_ratio} {list(tops)}"

    def chosen(weights: Mapping[str, float]) -> Mapping[str, float]:
        return _meet(experiment, budget, lambda t: _grown(tops, weights, t))

    done: list[int] = []

    def objective(tell: Progress, trial: Any) -> float:
        weights = {name: trial.suggest_float(name, 0.02, 1.0) for name in tops}
        kept = experiment.kept(chosen(weights))
        value = experiment.value(metric, kept, f"trial {trial.number}")
        done.append(trial.number)
        tell(f"trial {trial.number}: {value:.6g}", len(done), trials)
        return value

    chosen(dict.fromkeys(tops, 1.0))  # out of reach is told before a study is made
    found = _open_study(optuna, storage, study, key, experiment.asked.seed)
    found.enqueue_trial(dict.fromkeys(tops, 0.5), skip_if_exists=True)
    with following(progress) as tell:
        found.optimize(partial(objective, tell), n_trials=trials)
    best = experiment.plan(chosen(found.best_params))
    lost = {choice.name: len(choice.removed) / choice.size for choice in best.groups}
    valued = [t for t in found.trials if t.value is not None]
    return Found(best, {name: lost[name] for name in tops}, found.best_value, len(valued))


def _open_study(optuna: Any, storage: Any, name: str, key: str, seed: int) -> Any:
    """The study, new or found in its storage; refused if it asks something else."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        found = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=seed),
            load_if_exists=storage is not None,
        )
    finally:
        optuna.logging.set_verbosity(level)
    if found.user_attrs.setdefault("asked", key) != key:
        raise PlanError(
            f"the study {name!r} asks something else",
            why="its weights, importance, budget, max_ratio or groups are not those of this search",
            fix="give another name: study='…'",
        )
    found.set_user_attr("asked", key)
    return found


def _grown(
    tops: Mapping[str, float], weights: Mapping[str, float], share: float
) -> dict[str, float]:
    """Ratios that grow with ``share``: none at 0, in proportion to weights at ½, the tops at 1."""
    if share <= 0:
        return dict.fromkeys(tops, 0.0)
    return {name: top * weights[name] ** ((1 - share) / share) for name, top in tops.items()}


def _meet(
    experiment: Experiment, budget: Budget, ratios_at: Callable[[float], Mapping[str, float]]
) -> Mapping[str, float]:
    """The least ratios, on a line from 0 to 1, that meet a budget."""
    graph, limits = experiment.graph, budget.limits(experiment.graph)

    def over(share: float) -> dict[str, int]:
        kept = experiment.kept(ratios_at(share))
        costs = {name: graph.cost(name, kept) for name in limits}
        return {name: cost for name, cost in costs.items() if cost > limits[name]}

    for name, cost in over(1.0).items():
        most = f"the largest ratios leave {cost:,} of {graph.cost(name):,}"
        raise BudgetError(
            f"{name} can't be brought to {limits[name]:,}",
            why="\n".join([most, *tell_pins(graph)]),
            fix="allow larger ratios, include more groups, or ask for less",
        )
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if over(middle) else (low, middle)
    return ratios_at(high)
