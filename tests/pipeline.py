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
from prunus.graph.axis import Label, Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Aligned, AtLeast, Lockstep
from prunus.graph.plans import Plan
from prunus.surgeon import apply
from prunus.surgeon.attributes import find_edits
from prunus.tracer.trace import trace
from prunus.tracer.wrappers import unwrapped
from prunus.verifier.judgement import Certificate
from prunus.verifier.randomize import randomize
from prunus.verifier.verify import NOT_INTERCHANGEABLE, verify
from tests.witness import Testimony, testify


def thin(graph: CouplingGraph, ratio: float = 0.3, seed: int = 0) -> Mask:
    """Remove about ``ratio`` of every group at random, at least one unit where two exist."""
    scores = np.random.default_rng(seed).random(graph.unit_count + 1)
    return take_lowest(graph, scores, ratio)


def take_lowest(graph: CouplingGraph, scores: np.ndarray, ratio: float) -> Mask:
    """The mask that takes the units of lowest score from every group.

    A group loses the rounded share, at least one unit where it has two, never its last; sets in
    lockstep lose the same number.  Units are given back where a dim would be left empty,
    or no multiple of what a kernel takes.
    """
    kept = graph.all_kept
    locked = [c.sets for c in graph.constraints if isinstance(c, Lockstep)]
    in_lockstep = {int(unit) for sets in locked for units in sets for unit in units}
    plain = [g.units for g in graph.groups if not in_lockstep.intersection(g.units.tolist())]
    for units in (*plain, *(units for sets in locked for units in sets)):
        count = min(max(1, round(ratio * len(units))), len(units) - 1)
        order = np.argsort(scores[units], kind="stable")[:count]
        kept[units[order[np.isfinite(scores[units[order]])]]] = False
    dims = [(c.label, c.least) for c in graph.constraints if isinstance(c, AtLeast)]
    for label, least in (*((label, 1) for label in graph.labels.values()), *dims):
        _fill(label, least, kept, scores)
    aligned = [c for c in graph.constraints if isinstance(c, Aligned)]
    while any(_round_up(c.label, c.multiple, kept, scores) for c in aligned):
        pass  # what one dim is given back may be one too many for another
    return kept


def _round_up(label: Label, multiple: int, kept: Mask, scores: np.ndarray) -> bool:
    """Give back the best units of a dim until it is a multiple; whether any was given back."""
    changed = False
    while kept[label].all(axis=1).sum() % multiple:
        gone = np.unique(label[~kept[label]])
        if not len(gone):  # whole, it is no multiple either
            break
        kept[gone[np.argmax(scores[gone])]] = changed = True
    return changed


def _fill(label: Label, least: int, kept: Mask, scores: np.ndarray) -> None:
    """Give back the best positions of a dim that would keep too few."""
    while not (whole := kept[label].all(axis=1)).all() and whole.sum() < least:
        gone = np.where(kept[label], 0.0, scores[label]).sum(axis=1)
        best = int(np.argmax(np.where(whole, -1.0, gone)))
        kept[label[best]] = True


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
