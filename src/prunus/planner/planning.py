"""A plan from options: which blocks go, the widths of what is left, and what verification rejects.

Plan, verify, find what is rejected, and plan again without that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from prunus.calibration.batches import Batches
from prunus.calibration.ranks import made_by_rank_0
from prunus.calibration.statistics import Wanted, gather
from prunus.errors import BudgetError, PlanError, VerifyError
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plan_records import Renaming
from prunus.graph.plans import Plan
from prunus.graph.progress import following
from prunus.importance import Statistics, needs_of
from prunus.importance.influence import block_influence
from prunus.planner.culprits import find_culprits, tell_groups
from prunus.planner.filters import inside
from prunus.planner.layers import drops_asked
from prunus.planner.option_values import takes_options
from prunus.planner.options import PlanKeywords, PlanOptions
from prunus.planner.widths import plan_of_mask, plan_widths
from prunus.recovery import LOOKED_AT
from prunus.surgeon.depth import without_blocks
from prunus.surgeon.tensors import refuse_quantized
from prunus.tracer.forward_fn import entered_by
from prunus.tracer.inputs import rebuild_inputs
from prunus.tracer.rerun import DRAWS
from prunus.tracer.trace import trace
from prunus.tracer.wrappers import unwraps
from prunus.verifier.judgement import Certificate
from prunus.verifier.verify import verify

if TYPE_CHECKING:
    from typing_extensions import Unpack

Restrict = Callable[[CouplingGraph], tuple[CouplingGraph, dict[str, str]]]
"""What narrows a graph to what can be said elsewhere: the graph, and what it holds and why."""


@takes_options(PlanOptions)
@unwraps
def plan(
    graph: CouplingGraph,
    model: nn.Module,
    **options: Unpack[PlanKeywords],
) -> Plan:
    """Choose the units that are kept, so that every cost is under its budget, or by a ratio.

    Where blocks are dropped, they are removed first, and the rest meets what is left of the budget.
    Where ``torch.distributed`` is initialised, every process calls this with its own part of the
    data: statistics are sums over all of them, and every process gets the plan of rank 0.

    Parameters
    ----------
    graph, model
        What :func:`prunus.trace` returned, and the model whose weights are scored.
    **options

    Raises
    ------
    BudgetError
        If the floors stop it; the message says which, and what is reachable.  If a scope of the
        budget matches nothing.  If no plan is as fast as asked; it says how fast one
        can get.
    DataError
        If the importance needs calibration data and there is none.
    PlanError
        If an option can't have this value, or contradicts another.  If blocks can't be dropped, the
        message says why.  If a glob matches no group, or a ratio contradicts a floor, the rounding
        or another ratio.
    """
    asked = PlanOptions(**options)
    asked.check()
    args, kwargs = (), {}
    if asked.drops:
        refuse_quantized(model)
        args, kwargs = _traced_inputs(graph, model, asked.seed)
    with entered_by(model, graph.forward_fn):
        return plan_verified(graph, model, args, kwargs, asked, verified=False).plan


@dataclass(frozen=True)
class Planned:
    """What :func:`plan_verified` found.

    Attributes
    ----------
    plan, certificate
        Without verification there is no certificate.
    held
        Groups and blocks that were kept whole, with the reason.
    graph, statistics
        Of the model without the blocks that are dropped.
    """

    plan: Plan
    certificate: Certificate | None
    held: dict[str, str]
    graph: CouplingGraph
    statistics: Statistics | None


def plan_verified(
    graph: CouplingGraph,
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
    asked: PlanOptions,
    *,
    verified: bool = True,
    each_group: bool = True,
    restrict: Restrict | None = None,
    repair: bool = False,
) -> Planned:
    """A plan that the verification accepts.

    Groups that the verification rejects are kept whole, and the plan is made again; so are blocks,
    unless they were named.

    Parameters
    ----------
    verified
        Without it the first plan is the result, and there is no certificate.
    each_group
        Whether the verification also removes every group alone.
    repair
        Whether the smaller model will be repaired: what that reads of the data is then collected
        along with what the importance reads.

    Raises
    ------
    VerifyError
        If it fails for every group, or for a block that was named.
    """
    if asked.data is not None:
        asked = replace(asked, data=Batches(asked.data, asked.samples))
    if asked.part is not None and asked.budget is not None:
        asked = replace(asked, budget=asked.budget.of_part(asked.part))
    task = _Task(graph, model, args, kwargs, asked, restrict, repair)
    graph = inside(graph, asked.part)
    held: dict[str, str] = {}
    blocks = {block.name for block in graph.blocks}
    with following() as tell:
        while True:
            names = drops_asked(graph, asked, lambda: task.influence, held)
            left = task.without(names)
            held |= left.held
            hold = {n: f"kept whole: {why}" for n, why in held.items() if n not in blocks}
            hold |= dict.fromkeys(asked.hold, "it is held")
            tell("planning", 0, None)
            chosen = made_by_rank_0(partial(task.plan, left, hold))
            if not verified:
                return Planned(chosen, None, held, left.graph, left.statistics)
            tell("verifying", 0, None)
            certificate = task.verify(chosen, left.traced, each_group=each_group)
            if certificate.verdict != "inexact":
                return Planned(chosen, certificate, held, left.graph, left.statistics)
            held |= task.reject(chosen, left, certificate)


def rejected(certificate: Certificate, groups: Mapping[str, str] | None = None) -> VerifyError:
    """The error for a plan that the verification rejects as a whole, or in each of these groups."""
    fix = "please report the case"
    if certificate.reason.startswith(DRAWS):
        fix = "prune it with these numbers fixed (a probability of 0, the mean for a sample)"
    return VerifyError(
        "the cut model would not compute what the original does without the removed units",
        why="\n".join([_why_inexact(certificate), *tell_groups(groups or {})]),
        fix=f"the model was not touched; {fix}",
    )


@dataclass(frozen=True)
class _Left:
    """A model without some of its blocks: its graph, what is kept whole, its statistics.

    ``traced`` is the graph as it was traced, ``graph`` the one to plan with.
    """

    dropped: tuple[str, ...]
    graph: CouplingGraph
    traced: CouplingGraph
    held: Mapping[str, str]
    statistics: Statistics | None


@dataclass(frozen=True)
class _Task:
    """A model with its inputs, and what is asked of it."""

    graph: CouplingGraph
    model: nn.Module
    args: Any
    kwargs: Mapping[str, Any]
    asked: PlanOptions
    restrict: Restrict | None
    repair: bool
    known: dict[tuple[str, ...], _Left] = field(default_factory=dict)

    @cached_property
    def influence(self) -> dict[str, float]:
        """That of every block, on calibration data or on one call of the forward."""
        if self.asked.data is not None:
            return block_influence(self.model, self.graph, self.asked.data)
        run = lambda model, _: model(*self.args, **self.kwargs)  # noqa: E731
        return block_influence(self.model, self.graph, [()], forward_fn=run)

    def without(self, names: tuple[str, ...]) -> _Left:
        """What planning needs to know of the model without these blocks."""
        if names not in self.known:
            graph, held = self.graph, dict[str, str]()
            with without_blocks(self.model, names):
                if names:
                    graph = self._trace()
                traced, graph = graph, inside(graph, self.asked.part)
                if self.restrict is not None:
                    graph, held = self.restrict(graph)
                statistics = self._collect(graph, first=not names)
            self.known[names] = _Left(names, graph, traced, held, statistics)
        return self.known[names]

    def _trace(self) -> CouplingGraph:
        return trace(self.model, self.args, self.kwargs, outputs=list(self.graph.kept_outputs))

    def _collect(self, graph: CouplingGraph, *, first: bool) -> Statistics | None:
        """What the importance reads of the data, and what repair reads, in one pass."""
        asked, needs = self.asked, needs_of(self.asked.importance)
        if asked.statistics is not None or not needs or not isinstance(asked.data, Batches):
            return asked.statistics
        seen = 0
        if self.repair:
            needs |= {"second_moment"}
            seen = len(asked.data.first(LOOKED_AT)) if first else 0
        wanted = Wanted(needs, asked.loss, seed=asked.seed, outputs=seen)
        return gather(self.model, graph, asked.data, wanted)

    def plan(self, left: _Left, hold: Mapping[str, str]) -> Plan:
        """The plan of what is left; fractions of the budget are those of the whole model."""
        asked = replace(self.asked, statistics=left.statistics)
        names = left.dropped
        with without_blocks(self.model, names):
            if not names:
                return plan_widths(left.graph, self.model, asked, hold)
            graph = _scopes_of_original(left.graph, names)
            if asked.cuts_widths:
                most = {} if asked.budget is None else asked.budget.limits(self.graph)
                limits = _left_of(most, graph)
                chosen = plan_widths(graph, self.model, asked, hold, limits=limits, dropped=names)
            else:
                origin = {"traced": graph.traced, "budget": None}
                chosen = plan_of_mask(graph, self.model, graph.all_kept, origin)
        costs = {name: (self.graph.cost(name), after) for name, (_, after) in chosen.costs.items()}
        return replace(chosen, drops=names, costs=costs)

    def verify(
        self, chosen: Plan, graph: CouplingGraph | None, *, each_group: bool = False
    ) -> Certificate:
        """The verdict on a plan; ``graph`` is that of the model without its blocks, if known."""
        return verify(
            *(chosen, self.model, self.args, self.kwargs),
            each_group=each_group,
            seed=self.asked.seed,
            graph=graph,
        )

    def reject(self, chosen: Plan, left: _Left, certificate: Certificate) -> dict[str, str]:
        """The blocks, or else the groups, that make the verification of a plan fail, and why."""
        found = self._reject_blocks(left.dropped)
        if found and not self.asked.drops_least:
            name, why = next(iter(found.items()))
            raise VerifyError(
                "without this block the model does not compute what it does when it is skipped",
                where=name,
                why=why,
                fix="drop another block; the model was not touched",
            )
        if not found:
            found = self._reject_groups(chosen, left)
            touched = sum(bool(choice.removed) for choice in chosen.groups)
            if not found or len(found) == touched:
                raise rejected(certificate, found)
        return found

    def _reject_blocks(self, names: Sequence[str]) -> dict[str, str]:
        """The blocks whose absence alone makes the verification fail, with the reason."""
        found: dict[str, str] = {}
        for name in names:
            with without_blocks(self.model, [name]):
                graph = self._trace()
                origin = {"traced": graph.traced}
                chosen = plan_of_mask(graph, self.model, graph.all_kept, origin)
            certificate = self.verify(replace(chosen, drops=(name,)), None)
            if certificate.verdict == "inexact":
                found[name] = _why_inexact(certificate)
        return found

    def _reject_groups(self, chosen: Plan, left: _Left) -> dict[str, str]:
        """The groups of a plan that make its verification fail, with the reason."""
        graph = left.graph
        kept = graph.mask_from_positions({a: np.asarray(stay) for a, stay in chosen.keep.items()})

        def fails(mask: Mask) -> str:
            if mask.all():
                return ""
            try:
                with without_blocks(self.model, chosen.drops):
                    part = plan_of_mask(graph, self.model, mask, {"traced": graph.traced})
            except PlanError as error:
                return str(error)
            certificate = self.verify(replace(part, drops=chosen.drops), left.traced)
            return _why_inexact(certificate) if certificate.verdict == "inexact" else ""

        return find_culprits(graph, kept, fails)


def _why_inexact(certificate: Certificate) -> str:
    return certificate.reason or f"the outputs differ by {certificate.rel_err:.1e}"


def _scopes_of_original(left: CouplingGraph, dropped: Sequence[str]) -> CouplingGraph:
    """The same graph, whose costs are found by the paths of the model with all its blocks."""
    renaming = Renaming(dropped)
    parts = {
        cost: {renaming.before(owner): part for owner, part in owners.items()}
        for cost, owners in left.parts.items()
    }
    return replace(left, parts=parts)


def _left_of(limits: Mapping[str, int], left: CouplingGraph) -> dict[str, int]:
    """The bounds of what is left; that of a scope which is gone holds."""
    found = {}
    for name, most in limits.items():
        with suppress(BudgetError):
            left.cost(name)
            found[name] = most
    return found


def _traced_inputs(graph: CouplingGraph, model: nn.Module, seed: int) -> Any:
    spec = graph.traced.get("inputs")
    if spec is None:
        raise PlanError(
            "there are no inputs to trace the model with once its blocks are dropped",
            why="those of its trace can't be described as plain data",
            fix="use prunus.shrink(model, args, drop=...), which has them",
        )
    return rebuild_inputs(spec, model, seed=seed)
