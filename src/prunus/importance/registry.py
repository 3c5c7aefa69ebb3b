"""Importances by name, and the one call that scores every unit of a graph."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prunus.calibration.statistics import NEEDS, Statistics
from prunus.errors import DataError, ModelError, PlanError
from prunus.graph.axis import Axis
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group
from prunus.tracer.registry import is_imported_again

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
    collected
        What :func:`prunus.importance.collect` made of calibration data, for criteria that need it.
    """

    graph: CouplingGraph
    tensors: Mapping[str, torch.Tensor]
    seed: int = 0
    sums: dict[tuple[str, Axis], Scores] = field(default_factory=dict, repr=False)
    collected: Statistics | None = None

    @property
    def statistics(self) -> Statistics:
        """What was collected; :class:`~prunus.errors.DataError` if nothing was."""
        if self.collected is None:
            raise DataError(
                "an importance asks for statistics of calibration data, and there are none",
                why="it does not declare what it needs, so nothing was collected",
                fix='register it with @importance(name, needs=("activation",)), say',
            )
        return self.collected

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
"""``(group, context) → scores`` of shape ``(group.size,)``; the least go first.

A group that it can't score gets infinite scores, and stays whole.  Where scores are negative, all
of them are shifted alike."""

_known: dict[str, Importance] = {}
_needs: dict[str, frozenset[str]] = {}
_comparable: set[str] = set()


def importance(
    name: str, needs: Iterable[str] = (), *, comparable: bool = False
) -> Callable[[Importance], Importance]:
    """Register a function under a name; a name that is taken is refused.

    ``needs`` says what :func:`~prunus.importance.collect` has to collect for it; ``comparable``,
    that scores of different groups compare as they are.

    >>> @importance("l2")
    ... def mine(group, context): ...
    Traceback (most recent call last):
        ...
    prunus.errors.PlanError: an importance called 'l2' exists already
      fix:   choose another name
    """
    wanted = frozenset(needs)
    if unknown := sorted(wanted - set(NEEDS)):
        raise PlanError(
            f"nothing called {unknown[0]!r} can be collected", why=f"known are {', '.join(NEEDS)}"
        )

    def register(function: Importance) -> Importance:
        if name in _known and not is_imported_again(_known[name], function):
            raise PlanError(
                f"an importance called {name!r} exists already", fix="choose another name"
            )
        _known[name] = function
        _needs[name] = wanted
        if comparable:
            _comparable.add(name)
        return function

    return register


def needs_of(criterion: str | Importance) -> frozenset[str]:
    """What a criterion reads of calibration data; empty if it looks at the weights alone.

    A function that is not registered may have an attribute ``needs``.

    >>> sorted(needs_of("taylor")), sorted(needs_of("l2"))
    (['gradient'], [])
    """
    if isinstance(criterion, str):
        _find(criterion)
        return _needs[criterion]
    return frozenset(getattr(criterion, "needs", ()))


def is_comparable(criterion: str | Importance) -> bool:
    """Whether scores of different groups compare as they are.

    >>> is_comparable("obs"), is_comparable("l2")
    (True, False)
    """
    return isinstance(criterion, str) and criterion in _comparable


def name_of(criterion: str | Importance) -> str:
    """What a criterion is called in reports and errors."""
    if isinstance(criterion, str):
        return criterion
    return str(getattr(criterion, "__name__", type(criterion).__name__))


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
    statistics: Statistics | None = None,
) -> Scores:
    """Scores of all units, shape ``(unit_count + 1,)``; entry 0, the unit that stays, is inf.

    Units in no group, and those of groups that the criterion can't score, are scored inf as well.

    Raises
    ------
    DataError
        If the criterion needs statistics that are not there.
    PlanError
        If it is unknown, returns something else than a score per unit, or can score no group.
    """
    function = _find(criterion) if isinstance(criterion, str) else criterion
    check_statistics(graph, criterion, statistics)
    context = Context(graph, tensors, seed, collected=statistics)
    scores = np.full(graph.unit_count + 1, np.inf)
    for group in graph.groups:
        scores[group.units] = _checked(criterion, group, function(group, context))
    finite = scores[np.isfinite(scores)]
    if graph.groups and not len(finite):
        raise PlanError(
            f"the importance {name_of(criterion)!r} can score none of the {len(graph.groups)} "
            "groups",
            why="none has what it looks at: " + (getattr(function, "__doc__", "") or "").strip(),
            fix="choose another one",
        )
    return scores - finite.min() if len(finite) and finite.min() < 0 else scores


def _checked(criterion: str | Importance, group: Group, found: Scores) -> Scores:
    """What a criterion returned, as numbers; refused unless it is one for every unit."""
    found = np.asarray(found, dtype=np.float64)
    if found.shape == (group.size,) and not np.isnan(found).any():
        return found
    wrong = f"shape {found.shape}"
    if found.shape == (group.size,):
        wrong = f"{int(np.isnan(found).sum())} NaN among {group.size} scores"
    raise PlanError(
        f"the importance {name_of(criterion)!r} returned {wrong}",
        where=f"group {group.name}",
        why=f"a score per unit was expected: {group.size} numbers",
        fix="look for NaN in weights and calibration data, or choose another one",
    )


def check_statistics(
    graph: CouplingGraph, criterion: str | Importance, statistics: Statistics | None
) -> None:
    """Refuse statistics that don't have what a criterion reads, or are another graph's."""
    missing = sorted(needs_of(criterion) - (statistics.needs if statistics else set()))
    if missing:
        raise DataError(
            f"the importance {name_of(criterion)!r} needs calibration data",
            why=f"it reads {'; '.join(NEEDS[need] for need in missing)}",
            fix="give data=loader, or "
            f"statistics=prunus.importance.collect(model, graph, loader, {missing})",
        )
    if needs_of(criterion) and statistics and statistics.unit_count != graph.unit_count:
        raise PlanError(
            "the statistics were collected for another graph",
            why=f"they speak of {statistics.unit_count} units, and this one has {graph.unit_count}",
            fix="collect them with this graph",
        )


def _find(name: str) -> Importance:
    if name in _known:
        return _known[name]
    near = difflib.get_close_matches(name, _known, n=1)
    raise PlanError(
        f"no importance is called {name!r}",
        why=f"known are {', '.join(names())}",
        fix=f"did you mean {near[0]!r}?" if near else "choose one of those, or pass a function",
    )
