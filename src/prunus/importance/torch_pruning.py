"""Importances of Torch-Pruning, as importances of Prunus: their users bring their own.

They score a group of Torch-Pruning's, a list of layers with the channels that go together.  Such a
list is made here of every group of a coupling graph, so that its criteria also serve on models of
which Torch-Pruning itself finds no groups, or wrong ones.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prunus.errors import PlanError, checks_options, require
from prunus.graph.axis import Axis
from prunus.graph.groups import Group
from prunus.importance import Context, Importance, name_of
from prunus.importance.magnitude import places_of
from prunus.importance.registry import Scores
from prunus.tracer.precision import same_draws

Index = NDArray[np.int64]

MODULE = "torch_pruning.pruner.importance"


@checks_options
def adapt(criterion: Any, model: nn.Module) -> str | Importance:
    """What may be passed as ``importance=``, made an importance: only Torch-Pruning's change."""
    engine = sys.modules.get(MODULE)  # who has an importance of it has imported it
    if engine is not None and isinstance(criterion, engine.Importance):
        return TorchPruning(criterion, model)
    found: str | Importance = criterion
    return found


@dataclass(frozen=True)
class _Layer:
    """A layer with the positions of it that a group's units stand on.

    ``positions`` are ascending, ``units`` are their units' numbers in the group.
    """

    module: nn.Module
    prune: Callable[..., Any]
    positions: Index
    units: Index


@checks_options
class TorchPruning:
    """A criterion of Torch-Pruning that scores the groups of a coupling graph.

    Of a unit with several channels (a head, a group of a convolution) it is the mean over them,
    which is how Torch-Pruning does it.  Criteria that draw random numbers draw the same for the
    same seed.  Groups without a layer that the criterion looks at stay whole.

    Parameters
    ----------
    criterion
        A ``torch_pruning.importance.Importance``, or any function of a group of Torch-Pruning's.
    model
        The model that was traced: criteria read its modules, with the gradients that are on them.

    Examples
    --------
    An importance of Torch-Pruning may be passed as it is, and becomes this:

    >>> import torch_pruning as tp                                               # doctest: +SKIP
    >>> prunus.plan(graph, model, ratio=0.5, importance=tp.importance.LAMPImportance())
    ...                                                                          # doctest: +SKIP
    """

    def __init__(self, criterion: Any, model: nn.Module) -> None:
        self._criterion = criterion
        self._model = model
        self.__name__ = f"torch_pruning.{name_of(criterion)}"
        self.__doc__ = "a layer that this criterion of Torch-Pruning looks at"

    def __call__(self, group: Group, context: Context) -> Scores:
        """Scores of shape ``(group.size,)``; :class:`~prunus.errors.PlanError` for other shapes."""
        layers = list(self._layers(group, context))
        root = next((layer for layer in layers if _holds_all(layer, group)), None)
        if root is None:
            return np.full(group.size, np.inf)
        scores = self._scored(_as_group(layers, root), group, context)
        if scores is None:
            return np.full(group.size, np.inf)
        found = np.asarray(torch.as_tensor(scores).detach().double().cpu().numpy())
        if found.shape != root.units.shape:
            raise PlanError(
                f"{self.__name__} returned shape {found.shape}",
                where=f"group {group.name}",
                why=f"the group has {len(root.units)} channels, and one score each was expected; "
                "Torch-Pruning takes their number from the first layer of its target_types",
                fix="let its target_types have the layers that make the channels",
            )
        total = np.bincount(root.units, weights=found, minlength=group.size)
        mean: Scores = total / np.bincount(root.units, minlength=group.size)
        return mean

    def _scored(self, asked: Any, group: Group, context: Context) -> Any:
        digest = hashlib.sha256(f"{context.seed}:{group.name}".encode()).digest()
        with same_draws():
            torch.manual_seed(int.from_bytes(digest[:8], "little"))
            return self._criterion(asked)

    def _layers(self, group: Group, context: Context) -> Iterator[_Layer]:
        """Those that Torch-Pruning knows, by their weights, in the model's order."""
        for axis, _ in group.axes:
            path, _, name = axis.tensor.rpartition(".")
            if name != "weight" or axis.tensor not in context.graph.parameters:
                continue
            module = self._model.get_submodule(path)
            prune = _pruning_function(module, axis)
            if prune is None:
                continue
            context.tensor(axis.tensor)  # refuses a weight that is not there
            position, unit = places_of(group, context.graph.labels[axis])
            # Of a grouped convolution, Torch-Pruning counts the channels of all groups.
            if prune.__name__ == "prune_in_channels" and axis.dim == 1:
                position, unit = _repeat(position, unit, module, len(context.graph.labels[axis]))
            order = np.argsort(position, kind="stable")
            yield _Layer(module, prune, position[order], unit[order])


def _pruning_function(module: nn.Module, axis: Axis) -> Callable[..., Any] | None:
    """What Torch-Pruning would cut that dim of a weight with: so it tells inputs from outputs."""
    ops = require("torch_pruning.ops", "bench")
    pruners = require("torch_pruning.pruner.function", "bench").PrunerBox
    kind = ops.module2type(module)
    made = {
        ops.OPTYPE.CONV: 1 if getattr(module, "transposed", False) else 0,
        ops.OPTYPE.LINEAR: 0,
        ops.OPTYPE.EMBED: 1,
    }
    if kind in made:
        outputs = axis.dim == made[kind]
        if axis.dim > 1 or (kind == ops.OPTYPE.EMBED and not outputs):
            return None
    elif kind not in pruners or axis.dim > 0:
        return None
    else:
        outputs = True
    pruner = pruners[kind]
    found: Callable[..., Any] = pruner.prune_out_channels if outputs else pruner.prune_in_channels
    return found


def _repeat(position: Index, unit: Index, module: nn.Module, width: int) -> tuple[Index, Index]:
    groups = int(getattr(module, "groups", 1))
    starts = np.repeat(np.arange(groups) * width, len(position))
    return np.tile(position, groups) + starts, np.tile(unit, groups)


def _holds_all(layer: _Layer, group: Group) -> bool:
    return len(np.unique(layer.units)) == group.size


def _as_group(layers: list[_Layer], root: _Layer) -> Any:
    """A group of Torch-Pruning's; its channels are numbered as they stand in ``root``.

    Its criteria take the number of channels from the first layer that they look at, so those
    with just as many come first.
    """
    dependency = require("torch_pruning.dependency", "bench")
    source = dependency.Node(root.module, None)
    found = dependency.Group()
    for layer in sorted(layers, key=lambda one: not np.array_equal(*_counts(one, root))):
        target = dependency.Node(layer.module, None)
        edge = dependency.Dependency(root.prune, layer.prune, source, target)
        found.add_dep(edge, layer.positions.tolist())
        found[len(found) - 1].root_idxs = _channels(layer, root).tolist()
    return found


def _counts(layer: _Layer, root: _Layer) -> tuple[Index, Index]:
    size = 1 + int(root.units.max())
    return np.bincount(layer.units, minlength=size), np.bincount(root.units, minlength=size)


def _channels(layer: _Layer, root: _Layer) -> Index:
    """Which channel of the root each position of a layer belongs to.

    Where a unit has k times as many positions here as there, k in a row belong to one channel, as
    when a picture is flattened.
    """
    here, there = _counts(layer, root)
    by_unit = np.argsort(root.units, kind="stable")
    starts = np.cumsum(there) - there
    order = np.argsort(layer.units, kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(here) - here, here)
    within = rank * there[layer.units] // here[layer.units]
    found: Index = by_unit[starts[layer.units] + within]
    return found
