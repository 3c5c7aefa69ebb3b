"""The whole honest way, for tests: trace, remove 30 % of every group, cut, verify, testify."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus.errors import PrunusError
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.planner.thin import thin as take_lowest
from prunus.surgeon import apply
from prunus.surgeon.attributes import find_edits
from prunus.tracer.trace import trace
from prunus.tracer.wrappers import unwrapped
from prunus.verifier.randomize import randomize
from prunus.verifier.verify import NOT_INTERCHANGEABLE, Certificate, verify
from tests.witness import Testimony, testify


def thin(graph: CouplingGraph, ratio: float = 0.3, seed: int = 0) -> Mask:
    """Remove about ``ratio`` of every group at random, at least one unit where two exist."""
    scores = np.random.default_rng(seed).random(graph.unit_count + 1)
    return take_lowest(graph, scores, ratio)


def without_mixing(graph: CouplingGraph, kept: Mask) -> Mask:
    """The same choice in the groups that nothing mixes; the others keep everything."""
    mask = kept.copy()
    for group in graph.groups:
        if group.mixing:
            mask[group.units] = True
    return mask


def plan_for(graph: CouplingGraph, model: nn.Module, kept: Mask) -> Plan:
    """The plan of a mask, with its edits and its inputs, as ``prunus.plan`` makes it."""
    plan = Plan.from_mask(graph, kept, origin={"traced": graph.traced})
    return replace(plan, edits=find_edits(unwrapped(model), graph, kept))


def cut(plan: Plan, model: nn.Module) -> nn.Module:
    """A pruned copy, its forward not tried."""
    return apply(plan, copy.deepcopy(model), check=False)


@dataclass(frozen=True)
class Judgement:
    """What came out at the end of the pipeline; ``refusal`` is the engine's own error."""

    certificate: Certificate | None = None
    testimony: Testimony | None = None
    refusal: str = ""

    @property
    def caught_by(self) -> str:
        """The first instrument that objects; empty if the model counts as exact."""
        if self.certificate is None:
            return "refusal"
        swapped_only = self.certificate.reason == NOT_INTERCHANGEABLE
        if self.certificate.verdict != "exact" and not (
            swapped_only and self.certificate.rel_err <= 1e-4
        ):
            return "verify"
        if self.certificate.unverified:
            return "unverified"
        if self.testimony is not None and self.testimony.verdict == "disagrees":
            return "witness"
        return "exchange" if swapped_only else ""


def judge(
    build: Callable[[], nn.Module],
    *args: Tensor,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 1,
    **options: Any,
) -> Judgement:
    """Build a model, let it listen, and take it through the whole pipeline."""
    torch.manual_seed(0)
    model = build().eval()
    kwargs = kwargs or {}
    randomize(model, args, kwargs)
    try:
        graph = trace(model, args, kwargs, **options)
        kept = thin(graph, seed=seed)
        certificate = verify(plan_for(graph, model, kept), model, args, kwargs)
        mask = without_mixing(graph, kept)
        if mask.all():
            return Judgement(certificate)
        plan = plan_for(graph, model, mask)
        testimony = testify(plan, model, cut(plan, model), args, kwargs)
    except PrunusError as error:
        return Judgement(refusal=f"{type(error).__name__}: {error}")
    return Judgement(certificate, testimony)
