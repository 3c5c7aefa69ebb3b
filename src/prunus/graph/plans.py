"""Plans: which positions of which tensors stay, as plain data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from prunus.errors import PlanError, checks_options, first_names, found_in
from prunus.files import replace_file
from prunus.graph.axis import Axis, Mask
from prunus.graph.plan_json import LIMIT, Traced, convert, read, read_traced, write
from prunus.graph.plan_records import (
    Cost,
    Edit,
    GroupChoice,
    Renaming,
    Scaling,
    check_follows,
    costs_lines,
    freeze,
    groups_lines,
    merge_edits,
    merge_groups,
    renamed,
)

if TYPE_CHECKING:
    from prunus.graph.coupling import CouplingGraph

_TRACED = "apply it to the model that was traced"


@checks_options
@dataclass(frozen=True)
class Plan:
    """What stays of a model, for another copy of it, a checkpoint, or a mask.

    Where blocks are dropped, all the rest of a plan speaks of the model that is left without
    them, its lists of modules closed up.

    Attributes
    ----------
    keep
        For every axis that loses something, the positions that stay, ascending.
    shapes
        Shapes of all parameters, buffers and tensor attributes, by their first names, before any
        is sliced.
    edits
        Attributes to set along.
    scalings
        Weights that are multiplied, to keep a softmax scale where it was.
    groups
        The choice in every group.
    costs
        Each cost before and after.
    origin
        Where the plan came from: importance, budget, scope, seed, … (JSON); ``renormalised`` are
        the groups whose removal changes kept weights.
    drops
        Module paths, in the original, of the blocks that go first.
    biases
        Biases that layers get which had none, zeros at first: their names, and the dim of the
        layer's weight along which they go.  ``shapes`` and ``keep`` have them as well.

    Examples
    --------
    >>> plan = Plan({Axis("w", 0): (0, 1, 2, 5)}, {"w": (6, 3)})
    >>> plan.resulting_shapes()
    {'w': (4, 3)}
    >>> Plan.from_json(plan.to_json()) == plan
    True
    >>> choice = GroupChoice("w[0]", 6, (3, 4))
    >>> print(Plan({}, {}, groups=(choice,), costs={"macs": (18000, 12000)}))
          before   after  share
    MACs  18.0 k  12.0 k    67%
    group  units  kept  share
    w[0]       6     4    67%
    """

    keep: Mapping[Axis, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    edits: tuple[Edit, ...] = ()
    scalings: tuple[Scaling, ...] = ()
    groups: tuple[GroupChoice, ...] = ()
    costs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    drops: tuple[str, ...] = ()
    biases: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "origin", freeze(self.origin))
        object.__setattr__(self, "drops", tuple(self.drops))

    def __str__(self) -> str:
        kept = [(g.name, g.size, g.size - len(g.removed)) for g in self.groups]
        dropped = [f"dropped: {', '.join(self.drops)}"] if self.drops else []
        through = self.origin.get("through", ())
        taken = through if isinstance(through, (list, tuple)) else ()
        return "\n".join(
            [*costs_lines(self.costs), *groups_lines(kept), *dropped, *map(str, taken)]
        )

    def with_biases(
        self, biases: Mapping[str, int], element_sizes: Mapping[str, int] | None = None
    ) -> Plan:
        """The same plan, which also gives a bias to these layers; see :attr:`biases`.

        Without the bytes of an element of each, what the model costs in bytes is not known.
        """
        keep, shapes, costs = dict(self.keep), dict(self.shapes), dict(self.costs)
        for name, dim in biases.items():
            weight = f"{name.removesuffix('bias')}weight"
            stay = self.keep.get(Axis(weight, dim))
            shapes[name] = (self.shapes[weight][dim],)
            if stay is not None:
                keep[Axis(name, 0)] = stay
            left = len(stay or range(*shapes[name]))
            for cost, size in (("params", 1), ("bytes", (element_sizes or {}).get(name))):
                before, after = costs.pop(cost, (None, 0))
                if before is not None and size is not None:
                    costs[cost] = (before, after + left * size)
        known = {**self.biases, **biases}
        return replace(self, keep=keep, shapes=shapes, costs=costs, biases=known)

    @property
    def widths(self) -> Plan:
        """The same plan for the model that is left when the blocks have been dropped."""
        return replace(self, drops=())

    @classmethod
    def from_mask(
        cls,
        graph: CouplingGraph,
        kept: Mask,
        edits: Sequence[Edit] = (),
        origin: Mapping[str, Any] | None = None,
    ) -> Plan:
        """The plan that keeps the units of a mask of shape ``(units + 1,)``."""
        _check_mask(graph, kept)
        return cls(
            keep=_kept(graph, kept),
            shapes={n: tuple(s) for n, s in graph.shapes.items() if n not in graph.aliases},
            edits=tuple(edits),
            scalings=tuple(_scalings(graph, kept)),
            groups=tuple(_choices(graph, kept)),
            costs={name: (graph.cost(name), graph.cost(name, kept)) for name in graph.costs},
            origin={**(origin or {}), **_renormalised(graph, kept)},
        )

    @property
    def traced(self) -> Traced | None:
        """What the model was traced with: its ``inputs`` and the shapes of its ``outputs``."""
        found = _steps(self.origin)[0].get("traced")
        return read_traced(found) if found else None

    @property
    def written(self) -> frozenset[str]:
        """Tensor attributes that the traced forward assigned, which a model may lack."""
        found = (step.get("traced") for step in _steps(self.origin))
        names = {name for one in found if one for name in read_traced(one).written}
        return frozenset(names - self.biases.keys())

    @property
    def stopped(self) -> Mapping[str, str]:
        """Names of the groups that can lose no more, with what stops them; as planned last."""
        return convert(_steps(self.origin)[-1].get("stopped", {}), dict[str, str], "origin.stopped")

    @overload
    def cost(self, name: None = None) -> dict[str, Cost]: ...

    @overload
    def cost(self, name: str) -> Cost: ...

    def cost(self, name: str | None = None) -> Cost | dict[str, Cost]:
        """A cost before and after, and its share; without a name all of them by name.

        Nothing is traced or run: the numbers are those of the cost polynomials.

        >>> Plan({}, {}, costs={"params": (200, 90)}).cost("params").share
        0.45
        """
        found = {key: Cost(*pair) for key, pair in self.costs.items()}
        if name is None:
            return found
        if name not in found:
            raise PlanError(
                f"the plan knows no cost called {name!r}",
                why=f"it counts {', '.join(found) or 'nothing'}",
                fix="ask for one of those",
            )
        return found[name]

    def width(self, group: GroupChoice) -> Cost:
        """Positions before and after of the axis that a group is named after.

        Heads × dim are one width, and both of their groups move it.
        """
        named = re.fullmatch(r"(.+)\[(\d+)\](/\d+)?", group.name)
        if named is None or named[1] not in self.shapes:  # not the name that a trace gives
            return Cost(group.size, group.size - len(group.removed))
        axis = Axis(named[1], int(named[2]))
        before = self.shapes[axis.tensor][axis.dim]
        return Cost(before, len(self.keep.get(axis, range(before))))

    def resulting_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors once the plan is applied."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        for axis, stay in self.keep.items():
            shapes[axis.tensor][axis.dim] = len(stay)
        return {name: tuple(shape) for name, shape in shapes.items()}

    def check_model(
        self, shapes: Mapping[str, tuple[int, ...]], parameters: Iterable[str] = ()
    ) -> None:
        """Refuse a model in which a tensor of the plan is missing or has another shape.

        Tensors that the plan doesn't know are no objection, since tied names and what a forward
        leaves behind are among them; but ``parameters``, by their first names, are.
        """
        missing = [name for name in self.shapes if name not in shapes]
        if missing:
            raise _another_model(f"no {first_names(missing)}", _TRACED)
        surplus = [name for name in parameters if name not in self.shapes]
        if surplus:
            raise _another_model(f"more than the plan has: {first_names(surplus)}", _TRACED)
        given = {name: tuple(shapes[name]) for name in self.shapes}
        if given != {name: tuple(shape) for name, shape in self.shapes.items()}:
            raise self._other_shapes(given)

    def _other_shapes(self, given: Mapping[str, tuple[int, ...]]) -> PlanError:
        pruned = given == self.resulting_shapes()
        before = f"{_TRACED}, before any pruning"
        fix = "the plan has been applied to it already" if pruned else before
        pairs = ((name, given[name], tuple(shape)) for name, shape in self.shapes.items())
        sizes = [f"{n} {one} where the plan has {own}" for n, one, own in pairs if one != own]
        return _another_model(first_names(sizes), fix)

    def then(self, later: Plan) -> Plan:
        """One plan for the original model out of this one and one for the model it leaves.

        Groups are matched by name and size; one of ``later`` that has no match is taken over
        as it is.  A cost is kept where ``later`` starts from the number at which this one ends.
        """
        first = self._without(later.drops).with_biases(later.biases)
        check_follows(first.resulting_shapes(), later.shapes, first.written | later.written)
        keep = dict(first.keep)
        for axis, stay in later.keep.items():
            if axis.tensor in first.shapes:  # else a forward wrote it on the model in between
                keep[axis] = first._in_original(axis, stay)
        scalings = (
            replace(s, positions=first._in_original(Axis(s.tensor, s.dim), s.positions))
            for s in later.scalings
        )
        return Plan(
            keep=keep,
            shapes=first.shapes,
            edits=merge_edits(first.edits, later.edits),
            scalings=(*first.scalings, *scalings),
            groups=merge_groups(first.groups, later.groups),
            costs={
                name: (before, later.costs[name][1])
                for name, (before, after) in self.costs.items()
                if name in later.costs and later.costs[name][0] == after
            },
            origin={"steps": (*_steps(self.origin), *_steps(later.origin))},
            drops=first.drops,
            biases=first.biases,
        )

    def _without(self, dropped: Sequence[str]) -> Plan:
        """The same plan, with blocks of the model that it leaves dropped as well."""
        if not dropped:
            return self
        names, old = Renaming(dropped), Renaming(self.drops)
        return replace(
            self,
            keep={
                Axis(later, axis.dim): stay
                for axis, stay in self.keep.items()
                if (later := names.after(axis.tensor)) is not None
            },
            shapes=names.left_of(self.shapes),
            edits=renamed(self.edits, "module", names),
            scalings=renamed(self.scalings, "tensor", names),
            groups=renamed(self.groups, "name", names),
            drops=(*self.drops, *map(old.before, dropped)),
            biases=names.left_of(self.biases),
        )

    def _in_original(self, axis: Axis, positions: tuple[int, ...]) -> tuple[int, ...]:
        """Positions of an axis of the model that this plan leaves, in the original."""
        stay = self.keep.get(axis)
        return positions if stay is None else tuple(stay[i] for i in positions)

    def to_json(self) -> str:
        """The plan as one line of JSON: sorted keys, indices as [start, stop) ranges."""
        return write(self)

    @classmethod
    def from_json(cls, text: str, *, limit: int = LIMIT) -> Plan:
        """Read what :meth:`to_json` wrote; :class:`~prunus.errors.PlanError` on anything else.

        A text of few bytes can speak of many positions; more than ``limit`` are refused.
        """
        return cls(**read(text, limit))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; the file is the old one or the new one, never half of it."""
        text = self.to_json()
        replace_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a file that :meth:`save` wrote."""
        try:
            with found_in(str(path)):
                return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise PlanError("this is no plan", where=str(path), why=str(error)) from error


def _another_model(has: str, fix: str) -> PlanError:
    return PlanError("this is a plan for another model", why=f"the model has {has}", fix=fix)


def _check_mask(graph: CouplingGraph, kept: Mask) -> None:
    if kept.shape != (graph.unit_count + 1,) or kept.dtype != np.bool_ or not kept[0]:
        raise PlanError(
            "this is no mask of the graph's units",
            why=f"it is {kept.dtype} of shape {kept.shape}",
            fix=f"give a bool array of shape ({graph.unit_count + 1},) whose entry 0 is true",
        )


def _kept(graph: CouplingGraph, kept: Mask) -> dict[Axis, tuple[int, ...]]:
    keep = {axis: tuple(stay.tolist()) for axis, stay in graph.positions(kept)}
    empty = [str(axis) for axis, stay in keep.items() if not stay]
    if empty:
        raise PlanError(f"nothing would stay of {first_names(empty)}", fix="keep a unit of each")
    return keep


def _renormalised(graph: CouplingGraph, kept: Mask) -> dict[str, list[str]]:
    cut = {group.name for group in graph.groups if not kept[group.units].all()}
    names = [name for name in graph.renormalised if name in cut]
    return {"renormalised": names} if names else {}


def _choices(graph: CouplingGraph, kept: Mask) -> Iterator[GroupChoice]:
    for group in graph.groups:
        removed = tuple(np.flatnonzero(~kept[group.units]).tolist())
        yield GroupChoice(group.name, group.size, removed)


def _scalings(graph: CouplingGraph, kept: Mask) -> Iterator[Scaling]:
    for rescale in graph.rescales:
        factor = rescale.factor(kept)
        if factor != 1.0:
            for tensor, dim, positions in rescale.targets:
                yield Scaling(tensor, dim, positions, factor)


def _steps(origin: Mapping[str, Any]) -> tuple[Any, ...]:
    steps = origin.get("steps")
    return steps if isinstance(steps, tuple) and steps and len(origin) == 1 else (origin,)
