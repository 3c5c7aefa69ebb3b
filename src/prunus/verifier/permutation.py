"""Units of one group are interchangeable: swap them everywhere, and nothing may change.

A third instrument, which judges the labels themselves.  It needs neither mask nor replay nor
cut: the user's model answers twice, the second time with its units in another order.  It holds
under norms, softmax and means over channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunus.graph.axis import Label
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group
from prunus.graph.program import state_of
from prunus.tracer.copies import duplicate
from prunus.tracer.outputs import answer_of
from prunus.tracer.rerun import lay, tied_nodes
from prunus.tracer.trace import quiet_run
from prunus.verifier.draws import Draws

INTERCHANGEABLE = 1e-4
"""Largest relative change of the outputs when units of one group take another order."""

Places = NDArray[np.int64]
"""By unit: which unit takes its place."""


def exchange_error(
    graph: CouplingGraph,
    model: nn.Module,
    groups: Iterable[Group],
    args: Any,
    kwargs: Mapping[str, Any],
    *,
    seed: int = 0,
    limit: float = 0.0,
    before: Mapping[str, Tensor] | None = None,
) -> float:
    """How much the kept outputs change when the units of the groups take another order.

    Units change places with units that stand on the same axes equally often.  Where an axis
    does not allow it (a group whose blocks differ), the group stays as it is.

    Parameters
    ----------
    limit
        A change above this is measured again in float64 where the model can run in it, since
        another order rounds differently and depth amplifies it.
    before
        What the model answers, where that is known and draws no random numbers.
    """
    pair = _Pair(graph, _permute(graph, groups, seed))
    single = pair.error(model, args, kwargs, before)
    if single <= limit:
        return single
    try:
        double = duplicate(model).double()
        exact = pair.run(double, *to_double((tuple(args), dict(kwargs))))
        known = all(bool(exact[0][name].isfinite().all()) for name in graph.kept_outputs)
    except (RuntimeError, TypeError):
        known = False
    if not known:  # a forward that insists on its own type, or overflows in another
        return single
    return relative_error({name: exact[0][name] for name in graph.kept_outputs}, exact[1])


class _Pair:
    """Runs a model and the same with its units in another order; random numbers move along."""

    def __init__(self, graph: CouplingGraph, place: Places) -> None:
        self._graph = graph
        self._random = bool(tied_nodes(graph.program))
        self._place = place

    def error(
        self,
        model: nn.Module,
        args: Any,
        kwargs: Mapping[str, Any],
        before: Mapping[str, Tensor] | None,
    ) -> float:
        """How far the outputs are apart; ``before`` are those of the model, if they are known."""
        before, after = self.run(model, args, kwargs, None if self._random else before)
        return relative_error({name: before[name] for name in self._graph.kept_outputs}, after)

    def run(
        self,
        model: nn.Module,
        args: Any,
        kwargs: Mapping[str, Any],
        before: Mapping[str, Tensor] | None = None,
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """The outputs before and after."""
        draws = Draws(self._graph.program)
        if before is None:
            with quiet_run(model), draws if self._random else nullcontext():
                before = answer_of(model(*args, **kwargs))
        draws = Draws(self._graph.program, draws.drawn, self._order)
        tied = draws if self._random else nullcontext()
        with _exchanged(self._graph, model, self._place), quiet_run(model), tied:
            return before, answer_of(model(*args, **kwargs))

    def _order(self, label: Label) -> Places:
        take = _take(label, self._place)
        return np.arange(len(label)) if take is None else take


def to_double(values: Any) -> Any:
    """The same containers, floating-point tensors in float64."""

    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating else value

    return tree_map(cast, values)


@contextmanager
def _exchanged(graph: CouplingGraph, model: nn.Module, place: Places) -> Iterator[None]:
    """Within, every unit's positions stand on every axis where the unit goes."""
    tensors, _ = state_of(model)
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for axis, label in graph.labels.items():
                take = _take(label, place)
                if take is not None and not np.array_equal(take, np.arange(len(take))):
                    tensor = tensors[axis.tensor]
                    before.append((tensor, tensor.data))
                    index = torch.as_tensor(take, device=tensor.device)
                    moved = tensor.detach().index_select(axis.dim, index)
                    tensor.data = lay(moved, tensor.stride())  # other memory, which nobody shares
        yield
    finally:
        for tensor, data in reversed(before):
            tensor.data = data


def _permute(graph: CouplingGraph, groups: Iterable[Group], seed: int) -> Places:
    random = np.random.default_rng(seed)
    place = np.arange(graph.unit_count + 1)
    for group in groups:
        labels = [graph.labels[axis] for axis, _ in group.axes]
        trial = place.copy()
        for members in _alike(group, labels):
            trial[members] = random.permutation(members)
        if all(_take(label, trial) is not None for label in labels):
            place = trial
    return place


def _alike(group: Group, labels: Iterable[Label]) -> list[Places]:
    """The group's units in classes that stand on the same axes equally often."""
    top = int(group.units[-1]) + 1
    owned = [label[label < top].ravel() for label in labels]
    counts = np.stack([np.bincount(units, minlength=top)[group.units] for units in owned])
    if (counts == counts[:, :1]).all():
        return [group.units]
    _, kind = np.unique(counts, axis=1, return_inverse=True)
    return [group.units[kind.ravel() == index] for index in range(int(kind.max()) + 1)]


def _take(label: Label, place: Places) -> Places | None:
    """Which old position every new one takes; None if the exchange does not fit the axis."""
    target = place[label]
    if label.shape[1] == 1:
        own, wanted = label[:, 0], target[:, 0]
        at = np.full(len(place), -1, dtype=np.int64)
        at[own] = np.arange(len(own))
        if np.array_equal(at[own], np.arange(len(own))):  # each unit stands there once: no sort
            found = at[wanted]
            return None if (found < 0).any() else found
    old, new = np.lexsort(label.T), np.lexsort(target.T)
    if not np.array_equal(label[old], target[new]):
        return None
    take = np.empty(len(label), dtype=np.int64)
    take[new] = old
    return take


def relative_error(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest ‖a − b‖∞ / ‖a‖∞ over the outputs; infinite where they can't be compared."""
    worst = 0.0
    for name, a in reference.items():
        b = other.get(name)
        if b is None or b.shape != a.shape:
            return float("inf")
        if a.numel() == 0:
            continue
        a, b = _real(a), _real(b)
        gap, scale = (a - b).abs().max().item(), a.abs().max().item()
        if not (np.isfinite(scale) and np.isfinite(gap)):
            same = a == b  # so are infinities of one sign: logits that a mask has ruled out
            gap = (a - b).abs().masked_fill(same, 0).max().item()
            scale = a.abs().masked_fill(same & a.isinf(), 0).max().item()
        if not (np.isfinite(scale) and np.isfinite(gap)):
            return float("inf")
        worst = max(worst, gap / scale if scale else float(gap > 0))
    return worst


def _real(tensor: Tensor) -> Tensor:
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    real = torch.view_as_real(dense) if dense.is_complex() else dense
    return real if real.dtype in (torch.float32, torch.float64) else real.double()
