"""The whole honest way, for tests: trace, remove 30 % of every group, cut, verify, testify."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunus.errors import PrunusError
from prunus.graph.axis import Label, Mask
from prunus.graph.coupling import CouplingGraph
from prunus.listening import listen
from prunus.oracle import Certificate, relative_error, verify
from prunus.planner.thin import thin as take_lowest
from prunus.plans import Plan
from prunus.surgeon import apply
from prunus.surgeon.attributes import find_edits
from prunus.tracer.program import state_of, tensors_of
from prunus.tracer.trace import trace
from prunus.witness import Testimony, testify


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
    return replace(plan, edits=find_edits(model, graph, kept))


def cut(plan: Plan, model: nn.Module) -> nn.Module:
    """A pruned copy, its forward not tried."""
    return apply(plan, copy.deepcopy(model), check=False)


def exchange(graph: CouplingGraph, model: nn.Module, args: tuple[Any, ...], seed: int = 0) -> float:
    """How much the outputs change when units change places, pairwise, in every group.

    If the couplings are right, units of one group that stand on the same axes are interchangeable
    and nothing changes.  That holds under norms, softmax and means over channels as well, of which
    the witness can say nothing, and it needs no replay and no mask: the user's model answers twice.
    """
    random = np.random.default_rng(seed)
    place = np.arange(graph.unit_count + 1)
    for group in graph.groups:
        shuffled = random.permutation(group.units)
        for a, b in zip(shuffled[::2], shuffled[1::2], strict=False):
            place[[a, b]] = b, a
            if any(_moves(graph.labels[axis], place) is None for axis, _ in group.axes):
                place[[a, b]] = a, b
    moved = copy.deepcopy(model)
    tensors, _ = state_of(moved)
    with torch.no_grad():
        for axis, label in graph.labels.items():
            take = _moves(label, place)
            assert take is not None
            tensor = tensors[axis.tensor]
            tensor.copy_(tensor.index_select(axis.dim, torch.as_tensor(take)))
        before, after = (dict(tensors_of(m(*args))) for m in (model, moved))
    return relative_error(before, after)


def _moves(label: Label, place: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Which old position every new one takes; None if the exchange does not fit the axis."""
    target = place[label]
    old, new = np.lexsort(label.T), np.lexsort(target.T)
    if not np.array_equal(label[old], target[new]):
        return None
    take = np.empty(len(label), dtype=np.int64)
    take[new] = old
    return take


@dataclass(frozen=True)
class Judgement:
    """What came out at the end of the pipeline; ``refusal`` is the engine's own error."""

    certificate: Certificate | None = None
    testimony: Testimony | None = None
    exchanged: float = 0.0
    refusal: str = ""

    @property
    def caught_by(self) -> str:
        """The instrument that objects; empty if the model counts as exact."""
        if self.certificate is None:
            return "refusal"
        if self.certificate.verdict != "exact":
            return "verify"
        if self.certificate.unverified:
            return "unverified"
        if self.testimony is not None and self.testimony.verdict == "disagrees":
            return "witness"
        return "exchange" if not self.exchanged <= 1e-4 else ""


def judge(
    build: Callable[[], nn.Module], *args: Tensor, seed: int = 1, **options: Any
) -> Judgement:
    """Build a model, let it listen, and take it through the whole pipeline."""
    torch.manual_seed(0)
    model = build().eval()
    listen(model, args, {})
    try:
        graph = trace(model, args, **options)
        kept = thin(graph, seed=seed)
        certificate = verify(plan_for(graph, model, kept), model, args)
        mask = without_mixing(graph, kept)
        if mask.all():
            return Judgement(certificate, None, exchange(graph, model, args))
        plan = plan_for(graph, model, mask)
        testimony = testify(plan, model, cut(plan, model), args)
    except PrunusError as error:
        return Judgement(refusal=f"{type(error).__name__}: {error}")
    return Judgement(certificate, testimony, exchange(graph, model, args))
