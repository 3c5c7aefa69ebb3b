"""Compensation in the order in which layers run, each on what the repaired ones before it give.

The dense model and the cut one run side by side.  With h what a weight W reads in the dense model
and g what it reads behind everything that was cut and repaired before it,

    W' = W_S + (W C_hg − W_S C_gg)(C_gg + λI)⁻¹,    b' = b + W E h − W' E g

says on g best what W says on h (C are covariances; S are the columns that stay).  So every layer
also makes up for what those before it have missed, which with dense inputs alone adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.cross import CrossMoments, fit_pairs
from prunus.calibration.im2col import matrix_of, weight_of
from prunus.calibration.paired import Pair
from prunus.calibration.readings import SecondMoments
from prunus.calibration.statistics import check_traced, kept_units
from prunus.graph.axis import kept_positions
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.program import state_of
from prunus.recovery.consumers import Consumer, find_consumers, new_biases_of
from prunus.recovery.least_squares import error_between, refold
from prunus.recovery.norms import batch_norms, measure
from prunus.recovery.order import Order, find_order
from prunus.recovery.queries_keys import Mixed
from prunus.recovery.refit import Repair, Repaired, outputs_that_stay, shift_constant
from prunus.surgeon.apply import cut
from prunus.surgeon.slicing import slice_tensor
from prunus.surgeon.snapshot import Snapshot, own_data
from prunus.tracer.copies import duplicate
from prunus.tracer.forward_fn import ForwardFn, entered_by

NO_LIMIT = 1 << 62
"""Of the sums that are never taken: those of a stage have a limit of their own."""


@dataclass(frozen=True)
class Options:
    """What :func:`prunus.compensate` was called with."""

    ridge: float
    new_biases: bool
    positions: int
    memory_limit: int


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
    turned: Mapping[str, Tensor],
    mixed: Sequence[Mixed],
    progress: Callable[[], None] | None,
) -> InOrder:
    """New weights for all that reads what a plan changes, stage by stage.

    The model is as before when this returns; what is repaired is a copy, cut already.  Memory holds
    that copy and the sums of one stage.  Every stage takes a pass of both models over the data,
    and one more of the copy where batch
    norms lie behind it: these are measured again before anything behind them is fitted.

    Parameters
    ----------
    plan
        What goes of the model as it is, without blocks to drop.
    data
        Batches, which are read for every stage.
    turned, mixed
        Other bases: tensors with which the dense model is the same, and what becomes of queries and
        keys in the smaller one.
    progress
        Called after every batch of every pass over both models.
    """
    kept = kept_units(graph, plan)
    order = find_order(graph, kept)
    with _holding(model, turned):
        dense, _ = state_of(model)
        check_traced(graph, dense)
        mixtures = _mixtures(dense, mixed)
        watched = SecondMoments(kept, options.positions, NO_LIMIT, frozenset(order.weights))
        pair = Pair(graph, model, watched)
        sites = tuple(site for site in pair.sites if site.tensor in order.weights
                      or len(kept_positions(site.label, kept)) < len(site.label))  # fmt: skip
        consumers, left = find_consumers(graph, model, sites, new_biases=options.new_biases)
        smaller = _Smaller(model, plan.with_biases(new_biases_of(consumers)), mixtures, order.norms)
        pair.join(smaller.model)
        found: dict[str, Repaired] = {}
        for stage, own in _by_stage(consumers, order).items():
            sums = _sum_up(pair, own, data, options.memory_limit, progress)
            for consumer in own:
                weight = mixtures.get(consumer.tensor, dense[consumer.tensor])
                rows = outputs_that_stay(consumer, tuple(weight.shape), smaller.keep(consumer))
                read = sums[pair.owner(consumer.site)]
                found[consumer.tensor] = refit(consumer, weight, rows, read, share=options.ridge)
                smaller.write(consumer, found[consumer.tensor])
            smaller.measure_norms(stage + 1, data, graph.forward_fn)
        smaller.measure_norms(len(graph.program.nodes), data, graph.forward_fn)
        norms = smaller.norms_of(dense)
    repaired = tuple((consumer, found[consumer.tensor]) for consumer in consumers)
    return InOrder(repaired, left, {**turned, **mixtures}, norms)


def _by_stage(consumers: Iterable[Consumer], order: Order) -> dict[int, list[Consumer]]:
    found: dict[int, list[Consumer]] = {}
    for consumer in sorted(consumers, key=lambda one: order.weights[one.tensor]):
        found.setdefault(order.weights[consumer.tensor], []).append(consumer)
    return found


def refit(
    consumer: Consumer, weight: Tensor, rows: Tensor, sums: CrossMoments, *, share: float
) -> Repaired:
    """Fit what stays of a weight to what all of it says, group by group of a convolution.

    Parameters
    ----------
    weight
        The dense weight.
    rows
        Whether each output stays, shape ``(outputs,)``: the report counts these alone.
    sums
        Of what it reads, in the dense model and now.
    share
        λ as a share of the mean variance of what is read now.
    """
    window = consumer.site.window
    matrix = matrix_of(weight.detach().to(sums.joint.total), window, consumer.dim)
    groups, outputs, columns = matrix.shape
    there = rows.to(matrix.device).view(groups, outputs)
    new, shift = torch.zeros_like(matrix), matrix.new_zeros(groups, outputs)
    errors = torch.zeros(4, dtype=torch.float64)
    ridge, kept = 0.0, 0
    for group in range(groups):
        if not there[group].any():
            continue
        for part in sums.pairings(group):
            own = matrix[group][:, part.columns]
            centred, raw = (part.dense, part.cross, part.inner), part.raw()
            used, means = (raw, None) if not consumer.place else (centred, part.means)
            found = refold(own, part.kept, used, means, share=share, rows=sums.count)
            stayed = own[:, part.kept]
            new[group][:, part.columns[part.kept]] = stayed + found.change
            shift[group] += found.shift
            ridge, kept = max(ridge, found.ridge), kept + len(part.kept)
            spread = ((own @ part.dense) * own).sum(1)
            missed = [error_between(own, stayed, moments) for moments in (raw, centred)]
            told = torch.stack([spread, *missed, found.error])
            errors += told[:, there[group]].sum(1).cpu()
    spread_, cut_, shifted, left = errors.tolist()
    report = Repair(
        tensor=consumer.tensor,
        kept=kept,
        columns=groups * columns,
        samples=sums.count,
        ridge=ridge,
        spread=spread_,
        cut=cut_,
        shifted=shifted,
        left=left,
        place=consumer.place,
        exact=sums.exact,
    )
    return Repaired(weight_of(new, window, weight.shape, consumer.dim), shift.flatten(), report)


def _sum_up(
    pair: Pair,
    consumers: Sequence[Consumer],
    data: Iterable[Any],
    limit: int,
    progress: Callable[[], None] | None,
) -> dict[int, CrossMoments]:
    """One pass: what each of the weights reads in both models, by number."""
    sums = {pair.owner(one.site): pair.sums_of(one.site) for one in consumers}
    fit_pairs(list(sums.values()), limit)
    pair.run(data, sums, progress)
    return sums


class _Smaller:
    """A cut copy of the model, into which new weights are written at the positions that stay.

    Parameters
    ----------
    state
        Tensors that the copy has in place of the model's.
    norms
        Running means of the batch norms that are to be measured again, and their stages.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        state: Mapping[str, Tensor],
        norms: Mapping[str, int],
    ) -> None:
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
        stages = {id(self._state[name]): stage for name, stage in norms.items()}
        self._due = {norm: stages[id(norm.running_mean)] for norm in batch_norms(self.model)
                     if id(norm.running_mean) in stages}  # fmt: skip
        self._measured: set[int] = set()

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

    def measure_norms(self, stage: int, data: Iterable[Any], forward_fn: ForwardFn | None) -> None:
        """Measure batch norms again whose inputs don't change from this stage on."""
        ready = [norm for norm, due in self._due.items() if due <= stage]
        if not ready:
            return
        with entered_by(self.model, forward_fn):
            measure(self.model, ready, data)
        for norm in ready:
            del self._due[norm]
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
        values = found.setdefault(mixing.tensor, state[mixing.tensor].detach().clone())
        mixing.apply(values)
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
