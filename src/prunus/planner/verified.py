"""Plans that the verifier accepts: plan, verify, find what is rejected, and plan without that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from prunus.calibration.batches import Batches
from prunus.calibration.statistics import Wanted, gather
from prunus.errors import PlanError, VerifyError
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group
from prunus.graph.plans import Plan
from prunus.graph.progress import Progress, following
from prunus.importance import Statistics, needs_of
from prunus.planner.culprits import tell_groups
from prunus.planner.depth_planning import measure_influence, plan_depth, plan_left
from prunus.planner.layers import drops_asked
from prunus.planner.options import PlanOptions
from prunus.planner.width_planning import plan_of_mask
from prunus.recovery import LOOKED_AT
from prunus.surgeon.depth import without_blocks
from prunus.tracer.rerun import DRAWS
from prunus.tracer.trace import trace
from prunus.verifier.judgement import Certificate
from prunus.verifier.verify import verify_traced

Restrict = Callable[[CouplingGraph], tuple[CouplingGraph, dict[str, str]]]
"""What narrows a graph to what can be said elsewhere: the graph, and what it holds and why."""


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
    task = _Task(graph, model, args, kwargs, asked, each_group, restrict, repair)
    with following() as tell:
        return task.solve(verified, tell)


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


@dataclass(frozen=True)
class _Left:
    """A model without some of its blocks: its graph, what is kept whole, its statistics.

    ``traced`` is the graph as it was traced, ``graph`` the one to plan with.
    """

    graph: CouplingGraph
    traced: CouplingGraph
    held: Mapping[str, str]
    statistics: Statistics | None


@dataclass(frozen=True)
class _Task:
    """Plan, verify, find what is rejected, and plan again without it."""

    graph: CouplingGraph
    model: nn.Module
    args: Any
    kwargs: Mapping[str, Any]
    asked: PlanOptions
    each_group: bool = True
    restrict: Restrict | None = None
    repair: bool = False
    known: dict[tuple[str, ...], _Left] = field(default_factory=dict)

    def solve(self, verified: bool, tell: Progress) -> Planned:
        """See :func:`plan_verified`."""
        held: dict[str, str] = {}
        asked = self.asked
        while True:
            names = drops_asked(self.graph, asked, lambda: self._influence, held)
            blocks = {block.name for block in self.graph.blocks}
            left = self._without(names)
            held |= left.held
            hold = {n: f"kept whole: {why}" for n, why in held.items() if n not in blocks}
            hold |= dict.fromkeys(asked.hold, "it is held")
            if left.statistics is not None:
                asked = replace(self.asked, statistics=left.statistics)
            tell("planning", 0, None)
            with without_blocks(self.model, names):
                chosen = plan_left(self.graph, left.graph, self.model, names, asked, hold=hold)
            if not verified:
                return Planned(chosen, None, held, left.graph, left.statistics)
            tell("verifying", 0, None)
            certificate = self._verify(chosen, left.traced, each_group=self.each_group)
            if certificate.verdict != "inexact":
                return Planned(chosen, certificate, held, left.graph, left.statistics)
            held |= self._reject(names, chosen, left, certificate)

    def _reject(
        self, names: Sequence[str], chosen: Plan, left: _Left, certificate: Certificate
    ) -> dict[str, str]:
        """The blocks, or else the groups, that make the verification of a plan fail, and why."""
        found = self._reject_blocks(names)
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

    def _without(self, names: Sequence[str]) -> _Left:
        """What planning needs to know of the model without these blocks."""
        key = tuple(names)
        if key not in self.known:
            asked = self.asked
            graph, statistics = self.graph, asked.statistics
            held: dict[str, str] = {}
            with without_blocks(self.model, names):
                if names:
                    outputs = list(graph.kept_outputs)
                    graph = trace(self.model, self.args, self.kwargs, outputs=outputs)
                traced = graph
                if self.restrict is not None:
                    graph, held = self.restrict(graph)
                needs = needs_of(asked.importance)
                if needs and asked.data is not None and statistics is None:
                    data, seen = Batches(asked.data, asked.samples), 0
                    if self.repair:
                        needs |= {"second_moment"}
                        seen = 0 if names else len(data.first(LOOKED_AT))
                    wanted = Wanted(needs, asked.loss, seed=asked.seed, outputs=seen)
                    statistics = gather(self.model, graph, data, wanted)
            self.known[key] = _Left(graph, traced, held, statistics)
        return self.known[key]

    @cached_property
    def _influence(self) -> dict[str, float]:
        return measure_influence(self.model, self.graph, self.asked.data, self.args, self.kwargs)

    def _verify(
        self, chosen: Plan, graph: CouplingGraph | None, *, each_group: bool
    ) -> Certificate:
        return verify_traced(
            chosen,
            self.model,
            self.args,
            self.kwargs,
            each_group=each_group,
            seed=self.asked.seed,
            graph=graph,
        )

    def _reject_blocks(self, names: Sequence[str]) -> dict[str, str]:
        """The blocks whose absence alone makes the verification fail, with the reason."""
        found: dict[str, str] = {}
        for name in names:
            chosen, _ = plan_depth(
                self.graph, self.model, [name], self.args, self.kwargs, PlanOptions()
            )
            certificate = self._verify(chosen, None, each_group=False)
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
            part = replace(part, drops=chosen.drops)
            certificate = self._verify(part, left.traced, each_group=False)
            return _why_inexact(certificate) if certificate.verdict == "inexact" else ""

        return find_culprits(graph, kept, fails)


def _why_inexact(certificate: Certificate) -> str:
    return certificate.reason or f"the outputs differ by {certificate.rel_err:.1e}"


MOST_CULPRITS = 16
"""When more groups than this fail one by one, the model as a whole is not understood."""


def find_culprits(graph: CouplingGraph, kept: Mask, fails: Callable[[Mask], str]) -> dict[str, str]:
    """Groups that have to stay whole so that a selection doesn't fail, with what went wrong.

    Parameters
    ----------
    graph, kept
        The selection that fails.
    fails
        What is wrong with a selection; empty if nothing is.  It is asked about log2(groups)
        times for each culprit.

    Returns
    -------
    dict
        Group name → reason, empty if the selection doesn't fail.  Where more than sixteen
        groups are to blame, every touched group is named.
    """
    touched = [group for group in graph.groups if not kept[group.units].all()]
    culprits: dict[str, str] = {}

    def removing(groups: Sequence[Group]) -> Mask:
        mask = graph.all_kept
        for group in groups:
            if group.name not in culprits:
                mask[group.units] = kept[group.units]
        return mask

    while reason := fails(removing(touched)):
        if len(culprits) == MOST_CULPRITS:
            return {group.name: reason for group in touched}
        low, high = 0, len(touched)  # removing the first `high` fails, the first `low` does not
        while high - low > 1:
            middle = (low + high) // 2
            found = fails(removing(touched[:middle]))
            if found:
                high, reason = middle, found
            else:
                low = middle
        culprits[touched[high - 1].name] = reason
    return culprits
