"""Plans: which positions of which tensors stay, as plain data."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from prunus.errors import PlanError, checks_options
from prunus.files import replace_file
from prunus.graph.axis import Axis, Mask
from prunus.graph.plan_diff import Cost, GroupDiff, PlanDiff
from prunus.graph.plan_json import LIMIT, VERSION, freeze, read, to_ranges
from prunus.graph.renaming import Renaming
from prunus.graph.traced import Traced, convert, read_traced

if TYPE_CHECKING:
    from prunus.graph.coupling import CouplingGraph

_NAMED = 3
"""How many culprits an error names before it only counts them."""


@dataclass(frozen=True, slots=True)
class Edit:
    """A Python attribute that follows its axis; sequences are kept as tuples.

    >>> Edit("layer1.norm", "normalized_shape", [64], [48]).after
    (48,)
    """

    module: str
    attribute: str
    before: Any
    after: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", freeze(self.before))
        object.__setattr__(self, "after", freeze(self.after))


@dataclass(frozen=True, slots=True)
class Scaling:
    """Positions of one axis of the original that are multiplied by a factor before they are cut."""

    tensor: str
    dim: int
    positions: tuple[int, ...]
    factor: float


@dataclass(frozen=True, slots=True)
class GroupChoice:
    """What goes from one group: ascending indices into its units, not unit ids."""

    name: str
    size: int
    removed: tuple[int, ...]


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
        The choice in every group, for people and for :meth:`diff`.
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
        if kept.shape != (graph.unit_count + 1,) or kept.dtype != np.bool_ or not kept[0]:
            raise PlanError(
                "this is no mask of the graph's units",
                why=f"it is {kept.dtype} of shape {kept.shape}",
                fix=f"give a bool array of shape ({graph.unit_count + 1},) whose entry 0 is true",
            )
        keep = {axis: tuple(stay.tolist()) for axis, stay in graph.positions(kept)}
        empty = [str(axis) for axis, stay in keep.items() if not stay]
        if empty:
            raise PlanError(f"nothing would stay of {_some(empty)}", fix="keep a unit of each")
        cut = {group.name for group in graph.groups if not kept[group.units].all()}
        renormalised = [name for name in graph.renormalised if name in cut]
        choices = (
            GroupChoice(g.name, g.size, tuple(np.flatnonzero(~kept[g.units]).tolist()))
            for g in graph.groups
        )
        return cls(
            keep=keep,
            shapes={n: tuple(s) for n, s in graph.shapes.items() if n not in graph.aliases},
            edits=tuple(edits),
            scalings=tuple(
                Scaling(tensor, dim, positions, factor)
                for rescale in graph.rescales
                if (factor := rescale.factor(kept)) != 1.0
                for tensor, dim, positions in rescale.targets
            ),
            groups=tuple(choices),
            costs={name: (graph.cost(name), graph.cost(name, kept)) for name in graph.costs},
            origin={
                **(origin or {}),
                **({"renormalised": renormalised} if renormalised else {}),
            },
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
        return frozenset(name for one in found if one for name in read_traced(one).written)

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
            raise PlanError(
                "this is a plan for another model",
                why=f"the model has no {_some(missing)}",
                fix="apply it to the model that was traced",
            )
        surplus = [name for name in parameters if name not in self.shapes]
        if surplus:
            raise PlanError(
                "this is a plan for another model",
                why=f"the model has more than the plan has: {_some(surplus)}",
                fix="apply it to the model that was traced",
            )
        other = [n for n, shape in self.shapes.items() if tuple(shapes[n]) != tuple(shape)]
        if other:
            given = {name: tuple(shape) for name, shape in shapes.items()}
            pruned = all(given[n] == shape for n, shape in self.resulting_shapes().items())
            told = [f"{n} {given[n]} where the plan has {tuple(self.shapes[n])}" for n in other]
            raise PlanError(
                "this is a plan for another model",
                why=f"the model has {_some(told)}",
                fix="the plan has been applied to it already"
                if pruned
                else "apply it to the model that was traced, before any pruning",
            )

    def diff(self, other: Plan) -> PlanDiff:
        """What the two plans remove differently and cost; groups by their names in the original.

        A group that only one of the plans knows, since the other drops its block, is left out.
        Nothing is traced or run.
        """
        mine, theirs = self._in_original_names(), other._in_original_names()
        shapes = self.shapes_before, other.shapes_before
        shared = shapes[0].keys() & shapes[1].keys()
        alike = all(shapes[0][name] == shapes[1][name] for name in shared)
        if not alike or (self.drops == other.drops and shapes[0] != shapes[1]):
            raise PlanError("these are plans for different models", fix="compare plans of one")
        a_drops, b_drops = set(self.drops), set(other.drops)
        found = []
        for name in {**mine, **theirs}:
            if a_drops != b_drops and not (name in mine and name in theirs):
                continue
            size = (mine.get(name) or theirs[name]).size
            gone = [side[name].removed if name in side else () for side in (mine, theirs)]
            if gone[0] != gone[1]:
                a, b = map(set, gone)
                only = tuple(sorted(a - b)), tuple(sorted(b - a))
                found.append(GroupDiff(name, *only, size, (size - len(a), size - len(b))))
        costs = self.cost(), other.cost()
        return PlanDiff(
            tuple(found),
            tuple(name for name in self.drops if name not in b_drops),
            tuple(name for name in other.drops if name not in a_drops),
            {
                name: (cost, costs[1][name])
                for name, cost in costs[0].items()
                if name in costs[1] and costs[1][name].before == cost.before
            },
        )

    @property
    def shapes_before(self) -> dict[str, tuple[int, ...]]:
        """The shapes by the names of the original; those of dropped blocks are not known."""
        names = Renaming(self.drops)
        return {
            names.before(name): tuple(shape)
            for name, shape in self.shapes.items()
            if name not in self.biases
        }

    def _in_original_names(self) -> dict[str, GroupChoice]:
        names = Renaming(self.drops)
        return {names.before(choice.name): choice for choice in self.groups}

    def then(self, later: Plan) -> Plan:
        """One plan for the original model out of this one and one for the model it leaves.

        Groups are matched by name and size; one of ``later`` that has no match is taken over
        as it is.  A cost is kept where ``later`` starts from the number at which this one ends.
        """
        first = self._without(later.drops).with_biases(later.biases)
        _check_follows(first.resulting_shapes(), later.shapes, first.written | later.written)
        keep = dict(first.keep)
        for axis, stay in later.keep.items():
            if axis.tensor not in first.shapes:  # what a forward wrote on the model in between
                continue
            known = first.keep.get(axis)
            keep[axis] = stay if known is None else tuple(known[i] for i in stay)
        edits = {(edit.module, edit.attribute): edit for edit in first.edits}
        for edit in later.edits:
            key = (edit.module, edit.attribute)
            before = edits[key].before if key in edits else edit.before
            edits[key] = Edit(edit.module, edit.attribute, before, edit.after)
        return Plan(
            keep=keep,
            shapes=first.shapes,
            edits=tuple(edit for edit in edits.values() if edit.before != edit.after),
            scalings=(*first.scalings, *(first._in_original(s) for s in later.scalings)),
            groups=_merge_groups(first.groups, later.groups),
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

        def left(name: str) -> str:
            return names.after(name) or ""

        def stays(name: str) -> bool:
            return names.after(name) is not None

        return replace(
            self,
            keep={
                Axis(left(axis.tensor), axis.dim): stay
                for axis, stay in self.keep.items()
                if stays(axis.tensor)
            },
            shapes={left(name): shape for name, shape in self.shapes.items() if stays(name)},
            edits=tuple(replace(e, module=left(e.module)) for e in self.edits if stays(e.module)),
            scalings=tuple(
                replace(s, tensor=left(s.tensor)) for s in self.scalings if stays(s.tensor)
            ),
            groups=tuple(replace(g, name=left(g.name)) for g in self.groups if stays(g.name)),
            drops=(*self.drops, *map(old.before, dropped)),
            biases={left(name): dim for name, dim in self.biases.items() if stays(name)},
        )

    def _in_original(self, later: Scaling) -> Scaling:
        stay = self.keep.get(Axis(later.tensor, later.dim))
        if stay is None:
            return later
        return replace(later, positions=tuple(stay[i] for i in later.positions))

    def to_json(self) -> str:
        """The plan as one line of JSON: sorted keys, indices as [start, stop) ranges."""
        document: dict[str, Any] = {
            "prunus_plan": VERSION,
            "keep": {str(axis): to_ranges(stay) for axis, stay in self.keep.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "edits": [
                {"module": e.module, "attribute": e.attribute, "before": e.before, "after": e.after}
                for e in self.edits
            ],
            "scalings": [
                {
                    "tensor": s.tensor,
                    "dim": s.dim,
                    "positions": to_ranges(s.positions),
                    "factor": s.factor,
                }
                for s in self.scalings
            ],
            "groups": [
                {"name": g.name, "size": g.size, "removed": to_ranges(g.removed)}
                for g in self.groups
            ],
            "costs": {name: list(pair) for name, pair in self.costs.items()},
            "origin": self.origin,
        }
        if self.drops:
            document["drops"] = list(self.drops)
        if self.biases:
            document["biases"] = dict(self.biases)
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, limit: int = LIMIT) -> Plan:
        """Read what :meth:`to_json` wrote; :class:`~prunus.errors.PlanError` on anything else.

        A text of few bytes can speak of many positions; more than ``limit`` are refused.
        """
        fields = read(text, limit)
        fields["edits"] = tuple(Edit(*edit) for edit in fields["edits"])
        fields["scalings"] = tuple(Scaling(*scaling) for scaling in fields["scalings"])
        fields["groups"] = tuple(GroupChoice(*group) for group in fields["groups"])
        return cls(**fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; the file is the old one or the new one, never half of it."""
        text = self.to_json()
        replace_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a file that :meth:`save` wrote."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise PlanError("this is no plan", where=str(path), why=str(error)) from error
        except PlanError as error:
            raise PlanError(
                error.what, where=f"{path} {error.where}".rstrip(), why=error.why, fix=error.fix
            ) from error


def _check_follows(
    first: Mapping[str, Any], second: Mapping[str, Any], written: Container[str]
) -> None:
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    names = [name for name in names if name not in written]
    if names:
        told = [f"{n}: {first.get(n, 'nothing')} and {second.get(n, 'nothing')}" for n in names]
        raise PlanError(
            "the later plan is not for the model that this one leaves",
            why=f"the shapes differ: {_some(told)}",
            fix="apply this plan, trace the result, and plan on that",
        )


def _merge_groups(
    first: Sequence[GroupChoice], second: Sequence[GroupChoice]
) -> tuple[GroupChoice, ...]:
    merged = {choice.name: choice for choice in first}
    for choice in second:
        known = merged.get(choice.name)
        if known is None:
            merged[choice.name] = choice
            continue
        stay = np.setdiff1d(np.arange(known.size), known.removed)
        if len(stay) == choice.size:
            gone = {*known.removed, *stay[list(choice.removed)].tolist()}
            merged[choice.name] = GroupChoice(choice.name, known.size, tuple(sorted(gone)))
    return tuple(merged.values())


def _steps(origin: Mapping[str, Any]) -> tuple[Any, ...]:
    steps = origin.get("steps")
    return steps if isinstance(steps, tuple) and steps and len(origin) == 1 else (origin,)


def _some(items: Sequence[str]) -> str:
    rest = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
