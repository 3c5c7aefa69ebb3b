"""Compensation in the order in which layers run, each on what the repaired ones before it give.

The dense model and the cut one run side by side, every batch in both, and stop before each weight
that reads changed values.  There the weight is fitted (:mod:`prunus.recovery.least_squares`) to say
of what it reads now what it says in the dense model, and all go on with it.  So every layer also
makes up for what those before it have missed, which with dense inputs alone adds up.  One forward
of each model is enough; meanwhile what is alive of all batches at one layer is in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunus.calibration.batches import check_traced
from prunus.calibration.moments import CrossMoments, Moments, OwnMoments, fit_pairs, nothing_seen
from prunus.calibration.sites import Read, Site, Sites, find_sites, kept_units
from prunus.calibration.statistics import WIDEST
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.program import Node, Ref, state_of
from prunus.graph.progress import counted
from prunus.recovery.head_dims import Mixed
from prunus.recovery.lanes import Norm, Pair, Race, reads_otherwise
from prunus.recovery.least_squares import (
    Consumer,
    Options,
    Repaired,
    find_consumers,
    new_biases_of,
    refit,
    shift_constant,
)
from prunus.recovery.norms import batch_norms, check_finite
from prunus.surgeon.apply import cut
from prunus.surgeon.snapshot import Snapshot, own_data
from prunus.surgeon.tensors import slice_tensor
from prunus.tracer.copies import duplicate
from prunus.tracer.dataflow import Dataflow, read_by


@dataclass(frozen=True, eq=False)
class InOrder:
    """New weights in the order in which they were found, and why others have none, by name.

    Beside these change ``state``, other bases, and ``norms``, what batch norms have measured again:
    tensors of the whole model.
    """

    repaired: tuple[tuple[Consumer, Repaired], ...]
    left: Mapping[str, str]
    state: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]


def repair_in_order(
    model: nn.Module,
    plan: Plan,
    graph: CouplingGraph,
    data: Iterable[Any],
    options: Options,
    *,
    moments: Mapping[str, Moments],
    turned: Mapping[str, Tensor],
    mixed: Sequence[Mixed],
) -> InOrder:
    """New weights for all that reads what a plan changes, layer by layer.

    The model is as before when this returns; what is repaired is a copy, cut already.  A weight
    that is read several times (tied, recurrent) is fitted first, to what it reads in the dense
    model.  Batch norms behind repaired weights are measured again when they are reached.

    Parameters
    ----------
    plan
        What goes of the model as it is, without blocks to drop.
    moments
        Of what weights read in the dense model, by their names.
    turned, mixed
        Other bases: tensors with which the dense model is the same, and what becomes of queries and
        keys in the smaller one.
    """
    kept = kept_units(graph, plan)
    weights, norms = find_changed(graph, kept)
    sites = find_sites(graph, weights)
    touched, tied = _touched(sites, kept, weights, moments)
    with _holding(model, turned):
        whole, _ = state_of(model)
        check_traced(graph, whole)
        mixtures = _mixtures(whole, mixed)
        consumers, left = find_consumers(graph, model, touched, new_biases=options.new_biases)
        smaller = _Smaller(model, plan.with_biases(new_biases_of(consumers)), mixtures)
        fits = _Fits({**whole, **mixtures}, smaller, kept, options)
        fits.fit_tied(consumers, moments)
        stops, due = _stops(consumers), smaller.norms_at(norms)
        with Race(graph, model, smaller.model, sites, [*stops], due) as race:
            for place, pairs in race.run(data):
                if place in due:
                    smaller.measure(due[place], [pair.smaller.value for pair in pairs])
                else:
                    fits.fit(stops[place], _sum_up(stops[place][0].site, kept, pairs, options))
            measured = smaller.norms_of(whole)
    left |= dict.fromkeys(tied, "it is read several times, and loses nothing itself")
    return InOrder(fits.of(consumers), left, {**turned, **mixtures}, measured)


def _touched(
    sites: Sites, kept: Mask, weights: Collection[str], moments: Collection[str]
) -> tuple[list[Site], set[str]]:
    """Where changed values are read; and weights that are read several times without moments."""
    touched = [site for site in sites.all if site.tensor in weights or site.loses(kept)]
    tied = {site.tensor for site in touched if site.readings > 1}.difference(moments)
    return [site for site in touched if site.tensor not in tied], tied


@dataclass(frozen=True, eq=False)
class _Fits:
    """New weights, as they are found; ``whole`` has the dense ones."""

    whole: Mapping[str, Tensor]
    smaller: _Smaller
    kept: Mask
    options: Options
    found: dict[str, Repaired] = field(default_factory=dict)

    def fit_tied(self, consumers: Iterable[Consumer], moments: Mapping[str, Moments]) -> None:
        """Fit weights that are read several times, to what they read in the dense model."""
        for one in consumers:
            if one.site.readings > 1:
                stay, taps = one.site.kept_channels(self.kept), one.site.window.taps
                self.fit([one], OwnMoments(moments[one.tensor], stay, taps))

    def fit(self, consumers: Iterable[Consumer], sums: OwnMoments | CrossMoments) -> None:
        """Fit weights that read the same, and write them into the smaller model."""
        for one in consumers:
            weight = self.whole[one.tensor]
            keep = self.smaller.keep(one)
            self.found[one.tensor] = refit(one, weight, keep, sums, self.options)
            self.smaller.write(one, self.found[one.tensor])

    def of(self, consumers: Sequence[Consumer]) -> tuple[tuple[Consumer, Repaired], ...]:
        """All of them, in order."""
        if any(one.tensor not in self.found for one in consumers):
            raise nothing_seen()
        return tuple((one, self.found[one.tensor]) for one in consumers)


def _stops(consumers: Iterable[Consumer]) -> dict[int, list[Consumer]]:
    """Weights that are read once, by where they, or others that read the same values, run first."""
    first: dict[int, int] = {}
    found: dict[int, list[Consumer]] = {}
    once = [one for one in consumers if one.site.readings == 1]
    for consumer in sorted(once, key=lambda one: one.site.place):
        place = first.setdefault(consumer.site.source, consumer.site.place)
        found.setdefault(place, []).append(consumer)
    return found


def _sum_up(
    site: Site,
    kept: Mask,
    pairs: Sequence[Pair],
    options: Options,
) -> CrossMoments:
    """What a weight is about to read, in both models and all batches."""
    stay, taps = site.kept_channels(kept), site.window.taps
    by_tap = taps > 1 and stay.shape[1] * taps > WIDEST  # too many columns for all products
    sums = CrossMoments(stay, taps, taps if by_tap else 1)
    fit_pairs([sums], options.memory_limit)
    for pair in counted(pairs, f"fitting {site.tensor}"):
        read: list[Tensor] = []
        for lane in (pair.dense, pair.smaller):
            one: Read = lane.value
            if lane is pair.smaller and sums.whole:
                one = _widened(one, stay.flatten())
            columns = one.columns(site.window, pair.first, options.positions)
            read.append(torch.cat(list(columns), 1))
        if read[0].shape[1] != read[1].shape[1]:
            raise reads_otherwise()
        sums.add(*read)
        if not bool(torch.isfinite(sums.joint.total).all()):
            raise site.not_finite()
    return sums


def _widened(read: Read, stay: Tensor) -> Read:
    """With zeros where the dense model has channels and the smaller one has not."""
    shape = list(read.data.shape)
    shape[read.dim] = len(stay)
    at = stay.nonzero()[:, 0].to(read.data.device)
    return read._replace(data=read.data.new_zeros(shape).index_copy_(read.dim, at, read.data))


class _Smaller:
    """A cut copy of the model, into which new weights are written at the positions that stay.

    Parameters
    ----------
    state
        Tensors that the copy has in place of the model's.
    """

    def __init__(self, model: nn.Module, plan: Plan, state: Mapping[str, Tensor]) -> None:
        self.model = duplicate(model)
        own, _ = state_of(self.model)
        with torch.no_grad():
            for name, values in state.items():
                own[name].copy_(values)
        cut(plan, self.model)
        self._keep: dict[str, dict[int, Tensor]] = {}
        for axis, stay in plan.keep.items():
            self._keep.setdefault(axis.tensor, {})[axis.dim] = torch.as_tensor(stay)
        self._state, _ = state_of(self.model)
        self._measured: set[int] = set()

    def norms_at(self, places: Mapping[str, int]) -> dict[int, Norm]:
        """Batch norms by where they run, of which there are places by their running means."""
        at = {id(self._state[name]): place for name, place in places.items() if name}
        norms = {id(norm.running_mean): norm for norm in batch_norms(self.model)}
        return {place: norms[mean] for mean, place in at.items() if mean in norms}

    def keep(self, consumer: Consumer) -> Mapping[int, Tensor]:
        """What stays of the dims of a weight that lose any."""
        return self._keep.get(consumer.tensor, {})

    def write(self, consumer: Consumer, new: Repaired) -> None:
        """Put a new weight in place, and its constant."""
        with torch.no_grad():
            self._state[consumer.tensor].copy_(slice_tensor(new.weight, self.keep(consumer)))
            if consumer.constant:
                shift = slice_tensor(new.shift, self._keep.get(consumer.constant, {}))
                shift_constant(self._state[consumer.constant], consumer, shift)

    def measure(self, norm: Norm, batches: Sequence[Tensor]) -> None:
        """Replace the statistics of a batch norm by those of what it is about to read."""
        norm.reset_running_stats()
        mean, variance = norm.running_mean, norm.running_var
        for number, x in enumerate(batches, start=1):
            F.batch_norm(x, mean, variance, training=True, momentum=1 / number)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(len(batches))
        check_finite(norm)
        self._measured.update(id(buffer) for buffer in norm.buffers())

    def norms_of(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What batch norms have measured, at the size of the dense model's."""
        found = {}
        for name, values in state_of(self.model)[0].items():
            if id(values) in self._measured:
                whole = dense[name].detach().clone()
                stay = self._keep.get(name, {}).get(0)
                found[name] = whole
                if stay is None:
                    whole.copy_(values)
                else:
                    whole.index_copy_(0, stay.to(whole.device), values)
        return found


def _mixtures(state: Mapping[str, Tensor], mixed: Sequence[Mixed]) -> dict[str, Tensor]:
    """Tensors in which outputs became sums of outputs."""
    found: dict[str, Tensor] = {}
    for mixing in (mixing for product in mixed for mixing in product.mixings):
        if mixing.tensor not in found:
            found[mixing.tensor] = state[mixing.tensor].detach().clone()
        mixing.apply(found[mixing.tensor])
    return found


@contextmanager
def _holding(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context the model has these tensors."""
    state, _ = state_of(model)
    before = Snapshot(model)
    try:
        with torch.no_grad():
            for name, new in values.items():
                own_data(state[name]).copy_(new)
        yield
    finally:
        before.restore()


def find_changed(graph: CouplingGraph, kept: Mask) -> tuple[set[str], dict[str, int]]:
    """Weights that read values that a plan changes, and batch norms behind such weights.

    Those are values on which units go, and what is made of such values.  The batch norms are there
    by the names of their running means, with the number of the operator.
    """
    flow = Dataflow(graph.program)
    weights: set[str] = set()
    norms: dict[str, int] = {}
    names = {node: product.name for node, _, product in flow.products() if product is not None}
    for place, node, fitted in _changed(flow, kept, {node for node in names if names[node]}):
        mean = node.args.get("running_mean")
        if fitted and isinstance(mean, Ref):
            norms.setdefault(flow.names.get(mean.value, ""), place)
        weights.add(names.get(node, ""))
    return weights - {""}, norms


def _changed(
    flow: Dataflow, kept: Mask, fitted: Collection[Node]
) -> Iterator[tuple[int, Node, bool]]:
    """Operators that read changed values, and whether one of these comes from a fitted weight."""
    behind: dict[int, bool] = {}  # by memory
    for place, node in enumerate(flow.program.nodes):
        roots = {flow.root(value) for value in read_by(node)} & behind.keys()
        if roots or any(_loses(flow, value, kept) for value in read_by(node)):
            after = any(behind[root] for root in roots)
            yield place, node, after
            for root in map(flow.root, node.outputs):
                behind[root] = after or node in fitted or behind.get(root, False)


def _loses(flow: Dataflow, value: int, kept: Mask) -> bool:
    """Whether units on a value are removed; a weight that loses rows gives the others as before."""
    labels = () if value in flow.fixed else flow.program.labels[value]
    units = [flow.program.label(label) for label in labels]
    return any(label is not None and not kept[label].all() for label in units)
