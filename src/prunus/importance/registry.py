"""Importances by name, and the one call that scores every unit of a graph."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prunus.errors import ModelError, PlanError
from prunus.graph.axis import Axis
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group

if TYPE_CHECKING:
    import torch

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Context:
    """What an importance may read.

    Attributes
    ----------
    graph
        The graph whose groups are scored.
    tensors
        Values of the model's tensors, by the names of ``graph.shapes``.
    seed
        For criteria that draw.
    sums
        Filled by criteria: what a whole axis was reduced to, by criterion and axis, so that no
        axis is read twice when several groups live on it.
    """

    graph: CouplingGraph
    tensors: Mapping[str, torch.Tensor]
    seed: int = 0
    sums: dict[tuple[str, Axis], Scores] = field(default_factory=dict, repr=False)

    def tensor(self, name: str) -> torch.Tensor:
        """The values of a tensor, detached; :class:`~prunus.errors.ModelError` without them."""
        if name not in self.tensors:
            raise ModelError(
                f"there are no values for {name}",
                why="the graph was traced from another model, or the tensor was left out",
                fix="pass the tensors of the model that was traced",
            )
        values = self.tensors[name].detach()
        if values.is_meta:
            raise ModelError(
                f"{name} has a shape but no values",
                why="it is on the meta device",
                fix='load the weights first, or plan without them: importance="random"',
            )
        return values


Importance = Callable[[Group, Context], Scores]
"""``(group, context) → scores`` of shape ``(group.size,)``, none negative; the least go first."""

_known: dict[str, Importance] = {}


def importance(name: str) -> Callable[[Importance], Importance]:
    """Register a function under a name; a name that is taken is refused.

    >>> @importance("l2")
    ... def mine(group, context): ...
    Traceback (most recent call last):
        ...
    prunus.errors.PlanError: an importance called 'l2' exists already
      fix:   choose another name
    """

    def register(function: Importance) -> Importance:
        if name in _known:
            raise PlanError(
                f"an importance called {name!r} exists already", fix="choose another name"
            )
        _known[name] = function
        return function

    return register


def names() -> tuple[str, ...]:
    """The names of all importances, sorted.

    >>> "l2" in names()
    True
    """
    return tuple(sorted(_known))


def score(
    graph: CouplingGraph,
    tensors: Mapping[str, torch.Tensor],
    criterion: str | Importance = "l2",
    seed: int = 0,
) -> Scores:
    """Scores of all units, shape ``(unit_count + 1,)``; entry 0, the unit that stays, is inf.

    Units in no group are scored inf as well.
    """
    function = _find(criterion) if isinstance(criterion, str) else criterion
    context = Context(graph, tensors, seed)
    scores = np.full(graph.unit_count + 1, np.inf)
    for group in graph.groups:
        found = np.asarray(function(group, context), dtype=np.float64)
        if found.shape != (group.size,) or np.isnan(found).any():
            wrong = "NaN" if found.shape == (group.size,) else f"shape {found.shape}"
            raise PlanError(
                f"the importance {getattr(function, '__name__', criterion)!r} returned {wrong}",
                where=f"group {group.name}",
                why=f"a score per unit was expected: {group.size} numbers",
            )
        scores[group.units] = found
    return scores


def _find(name: str) -> Importance:
    if name in _known:
        return _known[name]
    near = difflib.get_close_matches(name, _known, n=1)
    raise PlanError(
        f"no importance is called {name!r}",
        why=f"known are {', '.join(names())}",
        fix=f"did you mean {near[0]!r}?" if near else "choose one of those, or pass a function",
    )
