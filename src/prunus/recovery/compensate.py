"""Cut a model and let what stays make up for what goes, in closed form."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from prunus.calibration.batches import Batches
from prunus.calibration.moments import OwnMoments
from prunus.calibration.sites import find_sites, kept_units
from prunus.calibration.statistics import Statistics, collect
from prunus.errors import DataError, PlanError, checks_options
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plan_records import Renaming
from prunus.graph.plans import Plan
from prunus.graph.program import state_of
from prunus.graph.progress import Progress, following
from prunus.recovery.attention_rows import find_values
from prunus.recovery.head_dims import Mixed, Turned, mix_products, turn_values
from prunus.recovery.least_squares import (
    RIDGE,
    Consumer,
    Method,
    Options,
    Repair,
    Repaired,
    find_consumers,
    new_biases_of,
    refit,
    shift_constant,
)
from prunus.recovery.sequential import repair_in_order
from prunus.surgeon.apply import cut
from prunus.surgeon.depth import without_blocks
from prunus.surgeon.snapshot import Snapshot, all_or_nothing, own_data
from prunus.surgeon.tensors import add_biases
from prunus.tracer.attention import score_weights
from prunus.tracer.inputs import rebuild_inputs
from prunus.tracer.trace import trace


@checks_options
@dataclass(frozen=True)
class Compensation:
    """What :func:`compensate` did.

    Attributes
    ----------
    plan
        What was applied: the plan that was given, and the biases that layers got.
    repairs
        For every weight that reads what was removed and could be changed, in the order in which
        they run; then for every product of queries and keys whose heads lost dims.
    left
        The other weights that read what was removed, with the reason.
    undo
        Puts the model back as it was.
    """

    plan: Plan
    repairs: tuple[Repair, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    undo: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)


@checks_options
@all_or_nothing
def compensate(
    model: nn.Module,
    plan: Plan,
    graph: CouplingGraph | None = None,
    data: Iterable[Any] | None = None,
    *,
    statistics: Statistics | None = None,
    method: Method = "least_squares",
    ridge: float = RIDGE,
    new_biases: bool = True,
    positions: int = 64,
    memory_limit: int = 8 << 30,
    optimizer: torch.optim.Optimizer | None = None,
    progress: Progress | None = None,
) -> Compensation:
    """Prune like :func:`prunus.apply`, and absorb removed units into the kept weights.

    Every weight that reads removed units gets the weights with which the kept units say
    best, in the least squares on calibration data, what all of them said (see
    :mod:`prunus.recovery.least_squares`).  Where heads lose dims of queries and keys, those that
    stay become the best subspace for their products (:mod:`prunus.recovery.head_dims`).  No
    labels are needed and nothing is trained.  It happens in place and either as a whole or not at
    all.

    Parameters
    ----------
    model, plan
        The model that was traced, whole, and what to cut.
    graph
        What :func:`prunus.trace` found in it; without it, or where the plan drops blocks, the model
        is traced again.
    data, statistics
        Calibration batches; or what :func:`~prunus.importance.collect` made of them with this graph
        and the need ``"second_moment"``.
    method
        ``"least_squares"``; ``"bias"``: the bias alone takes up the mean of what is removed (An et
        al., 2024); or ``"sequential"``: weights are fitted in the order in which they run, each on
        what it reads behind those that are repaired already, so that it makes up for their error
        as well (:mod:`prunus.recovery.sequential`).  Every named weight that reads changed values
        is fitted then, and batch norms behind repaired weights are measured again.  It takes one
        forward of the data through both models, and where heads lose dims, one to collect
        statistics, if none are given.  A copy of the smaller model is in memory meanwhile, and
        what is alive of all batches at one layer of both; ``memory_limit`` holds for the sums of
        each layer.
    ridge
        λ as a share of the mean variance of what is kept.
    new_biases
        Whether layers that have none may get a bias; the plan that comes back has them, and so do
        files of :func:`prunus.save`.  A batch norm behind a layer takes up the constant as well.
        Where nothing can, the fit is one without a constant.
    positions, memory_limit
        See :func:`prunus.importance.collect`.
    optimizer
        See :func:`prunus.apply`.
    progress
        As of :func:`prunus.importance.collect`.

    Raises
    ------
    DataError
        If there are neither data nor statistics, or they are empty, not finite, or another plan's;
        if the method is ``"sequential"`` and there are no data.
    PlanError
        If the plan or the statistics are for another model, or an option is out of range.
    ApplyError
        If the smaller model does not run; it was put back.

    Examples
    --------
    >>> import prunus
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> x = torch.randn(64, 4)
    >>> graph = prunus.trace(model, x)
    >>> plan = prunus.plan(graph, model, ratio=0.5)
    >>> done = prunus.recovery.compensate(model, plan, graph, [x])
    >>> model[2].in_features, done.repairs[0].left < done.repairs[0].cut
    (4, True)
    """
    options = Options(method, ridge, new_biases, positions, memory_limit)
    _check(options, data, statistics)
    data = Batches(() if data is None else data)
    if graph is None or plan.drops:
        with without_blocks(model, plan.drops):
            graph = trace_again(model, plan)
    with following(progress):
        return cut_and_compensate(
            *(model, plan, graph, data, statistics, options), optimizer=optimizer
        )


def cut_and_compensate(
    model: nn.Module,
    plan: Plan,
    graph: CouplingGraph,
    data: Iterable[Any],
    statistics: Statistics | None,
    options: Options,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    check: bool = True,
) -> Compensation:
    """What :func:`compensate` does, with the graph of the model without the blocks to drop."""
    before = Snapshot(model, optimizer)
    with without_blocks(model, plan.drops):
        change = _change_of(model, plan.widths, graph, data, statistics, options)
    _warn_of_few([new.report for _, new in change.repaired])
    grown = _write(model, plan, change)
    cut(grown, model, optimizer=optimizer, check=check)
    reports = [new.report for _, new in change.repaired] + [one.report for one in change.mixed]
    return Compensation(grown, tuple(reports), dict(change.left), before.restore)


@dataclass(frozen=True, eq=False)
class _Change:
    """What becomes of a model's tensors before it is cut, one after the other."""

    turned: Turned = field(default_factory=lambda: Turned({}, ()))
    repaired: tuple[tuple[Consumer, Repaired], ...] = ()
    mixed: tuple[Mixed, ...] = ()
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)


def _change_of(
    model: nn.Module,
    plan: Plan,
    graph: CouplingGraph,
    data: Iterable[Any],
    statistics: Statistics | None,
    options: Options,
) -> _Change:
    """Other bases from dense inputs; then weights, at once or layer after layer."""
    in_order = options.method == "sequential"
    if statistics is None and not (in_order and _reads_no_dense(graph)):
        statistics = collect(
            *(model, graph, data, "second_moment"),
            plan=plan,
            positions=options.positions,
            memory_limit=options.memory_limit,
        )
    if statistics is not None and not _has_moments(statistics, graph):
        raise DataError(
            "these statistics are not those of this graph's second moments",
            why=f"they have {', '.join(sorted(statistics.needs))} of {statistics.unit_count} units",
            fix='prunus.importance.collect(model, graph, data, "second_moment")',
        )
    bases = _Change()
    if statistics is not None and options.method != "bias":
        bases = _change_bases(model, plan, graph, statistics)
        statistics = replace(statistics, sites=bases.turned.sites)
    if in_order or statistics is None:
        return _change_in_order(model, plan, graph, data, bases, options)
    repaired, left = repair_all(model, plan, graph, statistics, options, bases.turned.state)
    return replace(bases, repaired=tuple(repaired), left={**left, **bases.left})


def _reads_no_dense(graph: CouplingGraph) -> bool:
    """Whether nothing of a sequential repair is fitted to dense inputs."""
    heads = score_weights(graph.program) or find_values(graph)
    return not heads and all(site.readings == 1 for site in find_sites(graph).all)


def _change_in_order(
    model: nn.Module,
    plan: Plan,
    graph: CouplingGraph,
    data: Iterable[Any],
    bases: _Change,
    options: Options,
) -> _Change:
    found = repair_in_order(
        *(model, plan, graph, data, options),
        moments={s.tensor: s.moments for s in bases.turned.sites if s.moments is not None},
        turned=bases.turned.state,
        mixed=bases.mixed,
    )
    mixed = tuple(replace(one, mixings=()) for one in bases.mixed)  # they are in the state
    turned = Turned(found.state, ())
    return _Change(turned, found.repaired, mixed, found.norms, {**found.left, **bases.left})


def _change_bases(
    model: nn.Module, plan: Plan, graph: CouplingGraph, statistics: Statistics
) -> _Change:
    """Other bases for the dims of heads, in which what goes is what is missed least."""
    dense, _ = state_of(model)
    kept = kept_units(graph, plan)
    mixed, left = mix_products(graph, plan, kept, dense, statistics.sites)
    turned = turn_values(graph, plan, dense, statistics.sites)
    return _Change(turned, mixed=tuple(mixed), left=left)


def _warn_of_few(repairs: Iterable[Repair]) -> None:
    """Say where weights have more columns than there are samples to fit them to."""
    few = [one for one in repairs if one.ridge and one.samples < one.kept]
    if not few:
        return
    worst = min(few, key=lambda one: one.samples / one.kept)
    others = f", and {len(few) - 1} more weights on too few" if len(few) > 1 else ""
    warnings.warn(
        f"{worst.tensor}: {worst.kept} kept input channels were fitted on only {worst.samples} "
        f"samples{others}; ridge increased (give more calibration data)",
        stacklevel=7,  # the caller's line: compensate() is wrapped three times
    )


def repair_all(
    model: nn.Module,
    plan: Plan,
    graph: CouplingGraph,
    statistics: Statistics,
    options: Options = Options(),  # noqa: B008 - a frozen record
    instead: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[list[tuple[Consumer, Repaired]], dict[str, str]]:
    """New weights for all that reads what a plan removes, and why others have none.

    The model is only read; see :func:`compensate`.  ``instead`` has tensors to take in place of
    the model's.
    """
    kept = kept_units(graph, plan)
    touched = [site for site in statistics.sites if site.loses(kept)]
    consumers, left = find_consumers(graph, model, touched, new_biases=options.new_biases)
    state = {**state_of(model)[0], **instead}
    keep: dict[str, dict[int, Tensor]] = {}
    for axis, stay in plan.keep.items():
        keep.setdefault(axis.tensor, {})[axis.dim] = torch.as_tensor(stay)
    repaired = []
    for consumer in consumers:
        site, weight = consumer.site, state[consumer.tensor]
        if site.moments is None:
            left[consumer.tensor] = "there are no second moments of what it reads"
            continue
        own = OwnMoments(site.moments, site.kept_channels(kept), site.window.taps)
        found = refit(consumer, weight, keep.get(consumer.tensor, {}), own, options)
        repaired.append((consumer, found))
    return repaired, left


def covers(statistics: Statistics, graph: CouplingGraph, plan: Plan) -> bool:
    """Whether statistics have all that :func:`compensate` reads for a plan."""
    kept, also = kept_units(graph, plan), score_weights(graph.program)
    sites = [s for s in statistics.sites if s.loses(kept) or s.tensor in also]
    known = all(site.moments is not None for site in sites if site.dim is not None)
    return known and _has_moments(statistics, graph)


def _has_moments(statistics: Statistics, graph: CouplingGraph) -> bool:
    return "second_moment" in statistics.needs and statistics.unit_count == graph.unit_count


def _check(options: Options, data: Iterable[Any] | None, statistics: Statistics | None) -> None:
    if options.method not in get_args(Method):
        raise PlanError(
            f"no method of compensation is called {options.method!r}",
            why=f"known are {', '.join(get_args(Method))}",
            fix='method="least_squares"',
        )
    if not 0 <= options.ridge < float("inf"):
        raise PlanError(
            f"the ridge is {options.ridge}",
            why="it is a share of the mean variance of the features",
            fix=f"give a finite number from 0 on; {RIDGE} is usual",
        )
    if data is None and (statistics is None or options.method == "sequential"):
        raise DataError(
            "compensation needs calibration data",
            why="statistics are of what layers read in the dense model"
            if statistics is not None
            else "kept weights are fitted on what the layers read",
            fix="give data=loader, or statistics=prunus.importance.collect(…, 'second_moment') and "
            'method="least_squares"',
        )


def trace_again(model: nn.Module, plan: Plan) -> CouplingGraph:
    """The graph of a model without the blocks that a plan drops, on inputs that it describes."""
    traced = plan.traced
    if traced is None or traced.inputs is None:
        raise PlanError(
            "there are no inputs to trace the model with",
            why="the plan does not describe those that it was made with",
            fix="give graph=prunus.trace(model, args)",
        )
    args, kwargs = rebuild_inputs(traced.inputs, model)
    return trace(model, args, kwargs, outputs=list(traced.outputs) or None)


def _write(model: nn.Module, plan: Plan, change: _Change) -> Plan:
    """Write the new weights into the whole model; the plan with the biases that layers got."""
    added = new_biases_of(consumer for consumer, _ in change.repaired)
    names = Renaming(plan.drops)
    add_biases(model, {names.before(name): dim for name, dim in added.items()})
    with without_blocks(model, plan.drops):
        state, _ = state_of(model)
    with torch.no_grad():
        _write_all(state, change)
    return plan.with_biases(added, {name: state[name].element_size() for name in added})


def _write_all(state: Mapping[str, Tensor], change: _Change) -> None:
    """Write what changes, in its order, into memory of its own: what was there is left alone."""
    owned: dict[str, Tensor] = {}

    def changing(name: str) -> Tensor:
        if name not in owned:
            owned[name] = own_data(state[name])
        return owned[name]

    for name, values in change.turned.state.items():
        changing(name).copy_(values)
    for consumer, new in change.repaired:
        changing(consumer.tensor).copy_(new.weight)
        if consumer.constant:
            shift_constant(changing(consumer.constant), consumer, new.shift)
    added = {c.tensor: c.constant for c, _ in change.repaired if c.place == "new bias"}
    for product in change.mixed:
        for mixing in product.mixings:
            mixing.apply(changing(mixing.tensor))
            if mixing.tensor in added:
                replace(mixing, dim=0).apply(changing(added[mixing.tensor]))
    for name, values in change.norms.items():
        changing(name).copy_(values)
