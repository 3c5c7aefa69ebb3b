"""What stays: from scores, a budget and blocks to drop to a plan."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from prunus.calibration.batches import bounded
from prunus.calibration.targets import Loss
from prunus.errors import checks_options
from prunus.graph.budget import Budget
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.importance import Importance, Statistics, needs_of
from prunus.latency import LatencyTable
from prunus.planner.alignment import RoundTo
from prunus.planner.allocate import Normalise, Scope
from prunus.planner.depth_planning import (
    measure_influence,
    plan_depth,
    refuse_statistics,
    traced_inputs,
)
from prunus.planner.layers import Drop, find_drops
from prunus.planner.options import check_options
from prunus.planner.width_planning import plan_widths
from prunus.surgeon.depth import refuse_quantized
from prunus.tracer.forward_fn import entered_by
from prunus.tracer.wrappers import unwraps

Globs = str | Sequence[str]


@checks_options
@unwraps
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
    ratios: Mapping[str, float] | None = None,
    scope: Scope = "local",
    normalise: Normalise | None = None,
    min_width: int | Mapping[str, int] = 1,
    max_ratio: float | Mapping[str, float] | None = None,
    round_to: RoundTo | Literal["latency"] | None = None,
    include: Globs | None = None,
    exclude: Globs = (),
    hold: Collection[str] = (),
    drop: Drop = (),
    latency: LatencyTable | None = None,
    protect_ends: bool = True,
    exchange: bool = False,
    seed: int = 0,
) -> Plan:
    """Choose what stays: so that every cost of a budget is met from below, or by a ratio.

    Where blocks are dropped, they go first, and what is left meets the rest of the budget.

    Parameters
    ----------
    graph, model
        What :func:`prunus.trace` found, and the model whose weights are scored.
    budget
        Upper bounds on ``params``, ``macs``, ``bytes``, peak ``activation`` memory and
        ``latency``, as fractions of the dense cost or absolute, of the whole model and (but for
        memory and latency) of parts of it; several hold at once.  A bound on latency is met within
        2 % by the clock: plans are cut on a copy, measured in turn with the dense model, and made
        again.
    ratio
        In place of a budget: the share of units that every group loses, whatever that costs.
    ratios
        With a budget or alone: the share of its units that a group loses, exactly, by globs over
        groups and their tensors, ``{"layer3.*": 0.3}``.  (Exactly: the nearest number of units
        that locksteps and rounding allow.)  The budget takes nothing else of these groups.
    importance
        A name: of the weights alone ``"l1"``, ``"l2"``, ``"lamp"``, ``"fpgm"``, ``"bn_scale"``;
        of calibration data ``"taylor"``, ``"fisher"``, ``"head_gradient"``, ``"activation"``,
        ``"wanda"``, ``"flap"``, ``"obs"``; the control ``"random"``.  Or a
        :class:`prunus.Movement`, an importance of Torch-Pruning, or a function of a group and a
        context.
    data, statistics
        Calibration batches for an importance that reads them, and for the influence of blocks
        (without them it is measured on random inputs of the traced shapes); or what
        :func:`prunus.collect` made of them for this graph, which may serve several plans.
    loss
        For gradients; see :func:`prunus.collect`.
    scope
        ``"local"`` (each group loses the same ratio), ``"isomorphic"`` (groups of one shape
        compete) or ``"global"`` (all groups compete; ``plan.origin`` has the part of all scores
        that the plan ``"retained"``, and the ``"bound"`` that no choice of units exceeds).  A list
        of globs over groups and their tensors, ``["backbone.*", "head.*"]``, makes classes by
        hand: groups that one glob fits compete, and every class loses the same ratio.
    normalise
        How scores of different groups are made comparable: divided by the ``"mean"`` of the group
        (what is done if nothing is said, but with ``"obs"`` in the global scope, whose scores are
        curves of error versus width and share the budget out as they are), its ``"max"`` or
        ``"sum"``; ``"standardised"`` (less the mean, over the deviation); ``"lamp"`` (the square
        over the sum of the squares that are no less); or ``"none"``.
    min_width, max_ratio
        Floors: units that every group keeps, and the largest ratio it may lose; one number, or
        numbers by globs.  If nothing is said, a budget in the global scope takes at most 0.8 of a
        group, so that no layer collapses.
    round_to
        If nothing is said, widths of channels and FFNs of 32 and more become multiples of 8 under
        a budget, or finer ones of groups of which a step of 8 would miss the bound by more than
        2 % of the dense cost; ``plan.origin["round_to"]`` says which.  Heads, experts, blocks and
        what ``ratios`` say are never rounded; ``round_to=1`` rounds nothing.  Otherwise every
        pruned width becomes a multiple of this; one number, or numbers by kind of layer and by
        globs: ``{"linear": 32, "conv": 8, "head.*": 1, "*": 4}``.  A group narrower than twice the
        number is rounded to half of it, and so on, down to 16: 32 is for groups at least 64 wide.
        Where several globs fit a group, the most specific one decides.  ``"latency"``: the
        number at which the time of most contractions steps, by the latency table.
    include, exclude
        Globs over group names and tensor names.
    hold
        Names of groups that stay whole (where blocks are dropped: names in what is left).
    drop
        Blocks to drop: their module paths, or how many, those of least influence
        (:func:`prunus.block_influence`).  Then neither budget nor ratio is needed.
    protect_ends
        Whether the first and last block of every stack stay when ``drop`` is a number.
    latency
        What :func:`prunus.measure` found.  With a budget of latency ``plan.costs["latency_ns"]``
        and ``plan.origin["latency"]`` say what was measured, without one what the table predicts.
    exchange
        Whether units that went are exchanged for ones that stay, at the widths that were chosen,
        as long as that lowers the error of ``"obs"``, whose data it reads.

    Raises
    ------
    BudgetError
        If the floors stop it; the message says which, and what is reachable.  If a scope of the
        budget matches nothing.  If the clock does not agree with any plan.
    DataError
        If the importance needs calibration data and there is none.
    PlanError
        If blocks can't be dropped, the message says why; or if statistics are given along: they are
        those of the model with all its blocks.  If a glob matches no group, or a ratio contradicts
        a floor, the rounding or another ratio.
    """
    options: dict[str, Any] = {
        "budget": budget,
        "ratio": ratio,
        "ratios": ratios,
        "importance": importance,
        "loss": loss,
        "scope": scope,
        "normalise": normalise,
        "min_width": min_width,
        "max_ratio": max_ratio,
        "round_to": round_to,
        "include": include,
        "exclude": exclude,
        "hold": hold,
        "exchange": exchange,
        "seed": seed,
        "latency": latency,
    }
    others = {"data": data, "statistics": statistics, "drop": drop, "protect_ends": protect_ends}
    check_request({**options, **others})
    if not isinstance(drop, int) and not drop:
        return plan_widths(graph, model, data=data, statistics=statistics, **options)
    refuse_quantized(model)
    refuse_statistics(statistics)
    data = None if data is None else bounded(data)
    args, kwargs = traced_inputs(graph, model, seed)
    with entered_by(model, graph.forward_fn):
        names = find_drops(
            graph, drop, lambda: measure_influence(model, graph, data, args, kwargs), protect_ends
        )
        return plan_depth(graph, model, names, args, kwargs, data=data, **options)[0]


DEFAULTS = {
    parameter.name: parameter.default
    for parameter in inspect.signature(plan).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
}
"""What the options of :func:`plan` are where nothing is said."""


def check_request(options: Mapping[str, Any]) -> None:
    """Refuse options of :func:`plan` that make no sense; those that are left out are the defaults.

    Raises
    ------
    PlanError
        The message names the option, and says why it is refused.
    """
    check_options({**DEFAULTS, **options}, DEFAULTS)
    if isinstance(options.get("importance"), str):
        needs_of(options["importance"])
