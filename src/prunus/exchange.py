"""Units of one group are interchangeable: swap them everywhere, and nothing may change.

A third instrument, which judges the labels themselves.  It needs neither mask nor replay nor
cut: the user's model answers twice, the second time with its units in another order.  It holds
under norms, softmax and means over channels, of which the second witness can say nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prunus.graph.axis import Label
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group
from prunus.tracer.program import state_of, tensors_of
from prunus.tracer.trace import quiet_run

Places = NDArray[np.int64]
"""By unit: which unit takes its place."""


def exchanged(
    graph: CouplingGraph,
    model: nn.Module,
    groups: Iterable[Group],
    args: Any,
    kwargs: Mapping[str, Any],
    *,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Outputs of the model with the units of the groups in another order.

    Units change places with units that stand on the same axes equally often.  Where an axis
    does not allow it (a group whose blocks differ), the group stays as it is.
    """
    place = _permute(graph, groups, seed)
    moved = copy.deepcopy(model)
    tensors, _ = state_of(moved)
    with torch.no_grad():
        for axis, label in graph.labels.items():
            take = _take(label, place)
            if take is not None and not np.array_equal(take, np.arange(len(take))):
                tensor = tensors[axis.tensor]
                index = torch.as_tensor(take, device=tensor.device)
                tensor.copy_(tensor.index_select(axis.dim, index))
    with quiet_run(moved):
        return dict(tensors_of(moved(*args, **kwargs)))


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
    counts = [np.bincount(units, minlength=top)[group.units] for units in owned]
    _, kind = np.unique(np.stack(counts), axis=1, return_inverse=True)
    return [group.units[kind.ravel() == index] for index in range(int(kind.max()) + 1)]


def _take(label: Label, place: Places) -> Places | None:
    """Which old position every new one takes; None if the exchange does not fit the axis."""
    target = place[label]
    old, new = np.lexsort(label.T), np.lexsort(target.T)
    if not np.array_equal(label[old], target[new]):
        return None
    take = np.empty(len(label), dtype=np.int64)
    take[new] = old
    return take
