"""The public verbs that need several rooms at once: plan and shrink."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from prunus.budget import Budget
from prunus.errors import DataError, PlanError, VerifyError
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.importance import Importance, Statistics, collect, name_of, needs_of, score
from prunus.importance.targets import Loss
from prunus.integrations.hf import example_inputs
from prunus.integrations.hf_config import uniform
from prunus.oracle import Certificate, verify
from prunus.planner import select, thin
from prunus.planner.allocate import Scope
from prunus.plans import Plan
from prunus.recovery import recalibrate
from prunus.rollback import find_culprits
from prunus.surgeon import apply
from prunus.surgeon.apply import Undo
from prunus.surgeon.attributes import find_edits
from prunus.tracer.program import state_of
from prunus.tracer.trace import trace, uncollected

Globs = str | Sequence[str]


def plan(
    graph: CouplingGraph,
    model: nn.Module,
    *,
    budget: Budget | None = None,
    ratio: float | None = None,
    importance: str | Importance = "l2",
    data: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    loss: Loss | None = None,
    scope: Scope = "local",
    min_width: int = 1,
    max_ratio: float = 1.0,
    round_to: int = 1,
    include: Globs | None = None,
    exclude: Globs = (),
    hold: Collection[str] = (),
    seed: int = 0,
) -> Plan:
    """Choose what stays: so that every cost of a budget is met from below, or by a ratio.

    Parameters
    ----------
    graph, model
        What :func:`prunus.trace` found, and the model whose weights are scored.
    budget
        Upper bounds on ``params`` and ``macs``, as fractions of the dense cost or absolute.
    ratio
        In place of a budget: the share of units that every group loses, whatever that costs.
    importance
        A name: of the weights alone ``"l1"``, ``"l2"``, ``"lamp"``, ``"fpgm"``, ``"bn_scale"``;
        of calibration data ``"taylor"``, ``"fisher"``, ``"head_gradient"``, ``"activation"``,
        ``"wanda"``, ``"flap"``, ``"confidence"``; the control ``"random"``.  Or a
        :class:`prunus.Movement`, or a function of a group and a context.
    data, statistics
        Calibration batches for an importance that reads them; or what :func:`prunus.collect` made
        of them, which may serve several plans.
    loss
        For gradients; see :func:`prunus.collect`.
    scope
        ``"local"`` (each group loses the same ratio), ``"isomorphic"`` (groups of one shape
        compete) or ``"global"`` (all groups compete: for scores that compare across layers).
    min_width, max_ratio
        Floors: units that every group keeps, and the largest ratio it may lose.
    round_to
        Every pruned width becomes a multiple of this.
    include, exclude
        Globs over group names and tensor names.
    hold
        Names of groups that stay whole.

    Raises
    ------
    BudgetError
        If the floors stop it; the message says which, and what is reachable.
    DataError
        If the importance needs calibration data and there is none.
    """
    if statistics is None and data is not None and needs_of(importance):
        statistics = collect(model, graph, data, needs_of(importance), loss=loss, seed=seed)
    options: dict[str, Any] = {
        "scope": scope,
        "min_width": min_width,
        "max_ratio": max_ratio,
        "round_to": round_to,
        "include": include,
        "exclude": exclude,
    }
    with uncollected():
        return _plan(graph, model, budget, ratio, importance, statistics, hold, seed, options)


def _plan(
    graph: CouplingGraph,
    model: nn.Module,
    budget: Budget | None,
    ratio: float | None,
    importance: str | Importance,
    statistics: Statistics | None,
    hold: Collection[str],
    seed: int,
    options: Mapping[str, Any],
) -> Plan:
    tensors, _ = state_of(model)
    scores = score(graph, tensors, importance, seed=seed, statistics=statistics)
    for name in hold:
        scores[graph.group(name).units] = np.inf
    kept = _choose(graph, scores, budget, ratio, **options)
    said = ("scope", "min_width", "max_ratio", "round_to")
    origin = {
        "importance": name_of(importance),
        "budget": None if budget is None else budget.requested,
        "ratio": ratio,
        **{name: options[name] for name in said},
        "hold": sorted(hold),
        "seed": seed,
        "traced": graph.traced,
    }
    return plan_of_mask(graph, model, kept, origin)


def plan_of_mask(
    graph: CouplingGraph, model: nn.Module, kept: Mask, origin: Mapping[str, Any]
) -> Plan:
    """The plan that keeps a mask's units, with the attributes that follow."""
    chosen = Plan.from_mask(graph, kept, origin=origin)
    return replace(chosen, edits=find_edits(model, graph, kept))


def _choose(
    graph: CouplingGraph,
    scores: NDArray[np.float64],
    budget: Budget | None,
    ratio: float | None,
    **options: Any,
) -> Mask:
    if budget is not None and ratio is None:
        return select(graph, scores, budget, **options)
    if ratio is not None and budget is None:
        _refuse_options(options)
        return thin(graph, scores, ratio)
    raise PlanError(
        "a budget and a ratio were given"
        if ratio is not None
        else "nothing says how much to remove",
        why="exactly one of the two says how much to remove",
        fix="give budget=Budget(macs=0.5), say, or ratio=0.3",
    )


def _refuse_options(options: Mapping[str, Any]) -> None:
    """A ratio is a ratio of every group: what shapes a budget's choice has no say in it."""
    neutral = {"min_width": 1, "max_ratio": 1.0, "round_to": 1, "include": None, "exclude": ()}
    given = [name for name, value in neutral.items() if options[name] != value]
    if given:
        raise PlanError(
            f"{', '.join(given)} can't be combined with ratio=",
            why="a ratio is taken from every group alike",
            fix="give a budget instead",
        )


@dataclass(frozen=True)
class Shrunk:
    """What :func:`shrink` did: the smaller model, the plan, and the proof.

    ``held`` names the groups that the proof rejected and that therefore stayed whole, with the
    reason.
    """

    model: nn.Module
    graph: CouplingGraph
    plan: Plan
    certificate: Certificate | None
    held: Mapping[str, str] = field(default_factory=dict)


def shrink(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    budget: Budget | None = None,
    data: Iterable[Any] | None = None,
    outputs: Globs | None = None,
    verified: bool = True,
    each_group: bool = True,
    mode: Literal["free", "uniform"] = "free",
    seed: int = 0,
    **options: Any,
) -> Shrunk:
    """Trace, plan, prove, cut and recalibrate, all in one call; the model changes in place.

    Groups of which the proof finds that the model's own code does not follow are kept whole,
    and the plan is made again without them.

    Parameters
    ----------
    model, args, kwargs
        The model and example inputs for its forward.
    budget
        See :func:`plan`, which also takes the ``options``.
    data
        Calibration batches, for batch norms (without them they keep the old statistics) and for
        an importance that reads them.  An iterator that has to serve both is kept as a list.
    verified
        Prove first, on a copy, that the cut model computes the masked original.
    each_group
        Let the proof also remove every group alone, and list those whose removal moves nothing;
        for a model of many groups that takes most of the time.
    mode
        ``"uniform"``, for models of transformers: only what the plain ``config.json`` can say, the
        same counts in every layer, so that ``from_pretrained`` of the unmodified library loads
        what :func:`prunus.integrations.hf.save` writes.  ``Shrunk.held`` names what it can't say.

    Raises
    ------
    VerifyError
        If the proof fails for every group; the model was not touched.
    BudgetError
        If the budget can't be met, or not without the groups that the proof rejects.
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    graph = trace(model, args, kwargs, outputs=outputs)
    needs = needs_of(options.get("importance", "l2"))
    loss = options.pop("loss", None)
    batches = data
    if data is not None and needs and options.get("statistics") is None:
        batches = list(data) if isinstance(data, Iterator) else data
        options["statistics"] = collect(model, graph, batches, needs, loss=loss, seed=seed)
    elif data is not None:
        batches = _at_least_one(data)
    held: dict[str, str] = {}
    if mode == "uniform":
        inputs = kwargs if kwargs and not args else example_inputs(model)
        graph, held = uniform(graph, model, inputs)
    certificate: Certificate | None = None
    asked = tuple(options.pop("hold", ()))
    while True:
        chosen = plan(graph, model, budget=budget, seed=seed, hold=(*asked, *held), **options)
        if not verified:
            break
        certificate = verify(chosen, model, args, kwargs, each_group=each_group, seed=seed)
        if certificate.verdict != "inexact":
            break
        found = _reject(graph, model, chosen, args, kwargs, seed)
        if not found or len(found) == sum(bool(choice.removed) for choice in chosen.groups):
            raise VerifyError(
                "the cut model would not compute what the original does without the removed units",
                why=certificate.reason or f"the outputs differ by {certificate.rel_err:.1e}",
                fix="the model was not touched; please report the case",
            )
        held |= found
    undo = Undo(chosen, model)
    apply(chosen, model)
    if batches is not None:
        try:
            recalibrate(model, batches)
        except BaseException:
            undo()
            raise
    return Shrunk(model, graph, chosen, certificate, held)


def _reject(
    graph: CouplingGraph, model: nn.Module, chosen: Plan, args: Any, kwargs: Any, seed: int
) -> dict[str, str]:
    """The groups of a plan that make its proof fail, with the reason."""
    kept = graph.mask_from_positions({a: np.asarray(stay) for a, stay in chosen.keep.items()})

    def fails(mask: Mask) -> str:
        if mask.all():
            return ""
        try:
            part = plan_of_mask(graph, model, mask, {"traced": graph.traced})
        except PlanError as error:
            return str(error)
        proof = verify(part, model, args, kwargs, each_group=False, seed=seed)
        if proof.verdict != "inexact":
            return ""
        return proof.reason or f"the outputs differ by {proof.rel_err:.1e}"

    return find_culprits(graph, kept, fails)


def _at_least_one(data: Iterable[Any]) -> Iterable[Any]:
    """The same batches; refused before anything is cut if there are none."""
    batches = iter(data)
    first = list(islice(batches, 1))
    if not first:
        raise DataError(
            "the calibration data is empty",
            why="the iterable gave no batch (an iterator can be used only once)",
            fix="give a DataLoader or a list of batches; the model was not touched",
        )
    return chain(first, batches)
