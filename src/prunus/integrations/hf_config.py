"""What a plain config.json can express, as constraints of a plan; the config of a result.

Nothing is known of any architecture.  Of each kind of structure (the FFN widths of a stack, its
heads, the residual width) a part is removed on trial, and integers of the config are changed in the
proportion in which tensors shrink, until the library builds that model and answers the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from prunus.errors import ModelError, PlanError, checks_options
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Constraint, Divisible, Lockstep, Preferred, Proportional
from prunus.graph.plan_records import Edit, kind_of_edit
from prunus.graph.plans import Plan
from prunus.integrations.hf_library import (
    Changes,
    Library,
    OtherAnswersError,
    Pairs,
    Place,
    shapes_of,
    unsaid,
    write,
)
from prunus.planner.allocate import select
from prunus.structures import find_structures
from prunus.surgeon.apply import cut_own
from prunus.surgeon.attributes import find_edits
from prunus.surgeon.depth import without_blocks
from prunus.surgeon.reach import (
    holders_of,
    own_copies,
    own_dicts,
    value_of,
    write_attribute,
)
from prunus.surgeon.snapshot import applied_plan
from prunus.tracer.copies import duplicate
from prunus.tracer.follow import is_config
from prunus.verifier import randomize

CLOSE = 1e-5
"""Largest relative difference between the outputs of the cut model and of the library's own."""

MULTIPLE = 16
"""Of which the hidden and FFN widths are multiples wherever a budget allows it."""

_TRIALS = 6
"""Numbers of units that are removed on trial before a kind is held."""


@dataclass(frozen=True, eq=False)
class _Kind:
    """Structures whose size one number of the config may state."""

    name: str
    groups: tuple[str, ...]
    sets: tuple[NDArray[np.int64], ...]

    @property
    def size(self) -> int:
        return len(self.sets[0])


@dataclass(frozen=True, eq=False)
class _Expressed:
    """Kinds that shrink in proportion, and the entries of the config that shrink with them."""

    kinds: tuple[_Kind, ...]
    places: frozenset[Place] = frozenset()

    @property
    def step(self) -> int:
        """In how many steps all units go."""
        return gcd(*(kind.size for kind in self.kinds))

    @property
    def tie(self) -> Lockstep:
        sets = tuple(units for kind in self.kinds for units in kind.sets)
        rates = tuple(len(units) // self.step for units in sets)
        names = " and ".join(kind.name for kind in self.kinds)
        reason = f"config.json has one number for the {names} of all layers"
        return Lockstep("equal count", sets, reason, rates)


class Uniform:
    """The plans whose results a plain config.json describes.

    Parameters
    ----------
    model, kwargs
        A model of transformers, and inputs on which answers are compared.
    """

    def __init__(self, model: nn.Module, kwargs: Mapping[str, Any]) -> None:
        if not hasattr(getattr(model, "config", None), "to_dict"):
            raise ModelError(
                f"{type(model).__name__} is no model of transformers",
                why='mode="uniform" is for models that a config.json describes',
                fix="leave out mode",
            )
        self._model, self._kwargs = model, kwargs
        self._known: dict[frozenset[str], list[_Expressed]] = {}
        self._stated: Changes = {}

    def restrict(self, graph: CouplingGraph) -> tuple[CouplingGraph, dict[str, str]]:
        """The graph with what the config demands as constraints; groups to hold, with the reason.

        Layers of one stack lose equally many units of a kind.  A kind that no change of the config
        expresses alone is tried with others in proportion: heads with the residual width,
        where a head is hidden ÷ heads wide.  One that can't be expressed either way is held.
        """
        library = Library(self._model)
        loud = duplicate(self._model)  # of untrained weights, wrong scales hardly move the answers
        randomize(loud, (), self._kwargs)
        found: list[_Expressed] = []
        failed: dict[_Kind, str] = {}
        for kind in _kinds(graph):
            one = self._try(graph, library, loud, (kind,))
            if isinstance(one, str):
                failed[kind] = one
            else:
                found.append(one)
        for some in _together(list(failed)):
            one = self._try(graph, library, loud, some) if failed.keys() >= {*some} else ""
            if not isinstance(one, str):
                found.append(one)
                failed = {kind: why for kind, why in failed.items() if kind not in some}
        self._known[frozenset(group.name for group in graph.groups)] = found
        extra = (
            *(one.tie for one in found if len(one.tie.sets) > 1),
            *_rules(library, found),
            *_preferred(found),
        )
        held = {group: why for kind, why in failed.items() for group in kind.groups}
        return replace(graph, constraints=(*graph.constraints, *extra)), held

    def _try(
        self, graph: CouplingGraph, library: Library, loud: nn.Module, kinds: tuple[_Kind, ...]
    ) -> _Expressed | str:
        """Which entries express that units of these kinds are removed, or why none do."""
        one = _Expressed(kinds)
        if any(len({len(units) for units in kind.sets}) > 1 for kind in kinds):
            return "layers differ to begin with"
        reasons = []
        for kept in _trials(graph, one):
            try:
                edits = find_edits(self._model, graph, kept)
                trial = replace(Plan.from_mask(graph, kept), edits=edits)
                cut = cut_own(trial, duplicate(loud, share=True))
                changes = _search(library, cut, _pairs(trial), self._kwargs)
            except OtherAnswersError as error:
                return error.why
            except (PlanError, ModelError) as error:
                reasons.append(error.why or error.what)
                continue
            share = kept[one.tie.sets[0]].mean()
            entries = library.entries()
            moved = {place: new for place, new in changes.items() if new != entries[place]}
            if all(abs(new - share * entries[place]) < 0.5 for place, new in moved.items()):
                return replace(one, places=frozenset(moved))
        return reasons[0] if reasons else "none can be removed in every layer"

    def accepted(self, plan: Plan) -> Plan:
        """The plan with all integers that state a width, once the library accepts its result.

        The library builds the result from its config, with these shapes, and answers the same;
        nothing of the model is changed.

        Raises
        ------
        ModelError
            If it does not.
        """
        cut = cut_own(plan, duplicate(self._model, share=True))
        wanted = shapes_of(cut)
        with without_blocks(self._model, plan.drops):
            library = Library(self._model)
            changes = self._changes(library, plan)
            wrong = library.differences(changes, wanted)
            if wrong is None or wrong:
                raise unsaid(wrong or {}, wanted, [])
            changes = library.without_needless(changes, wanted)
            self._stated = {place: changes[place] for place in library.stated if place in changes}
            edits = tuple(_follow(self._model, library.build(changes), plan.edits))
        own_copies(cut, edits)
        modules = dict(cut.named_modules(remove_duplicate=False))
        for edit in edits:
            write_attribute(modules[edit.module], edit.attribute, edit.after)
        gap = library.gap(changes, cut, self._kwargs)
        if gap > CLOSE:
            raise unsaid({}, wanted, [gap])
        return replace(plan, edits=(*plan.edits, *edits))

    def state(self, model: nn.Module) -> None:
        """Let the config of the cut model say what it left to be derived before."""
        config: Any = model.config
        for place, value in self._stated.items():
            holder = config
            for name in place[:-1]:
                holder = getattr(holder, name)
            kinds = [one for module in model.modules() for one in vars(module).values()
                     if type(one) is type(holder)]  # fmt: skip
            written = {id(vars(one)): vars(one) for one in [holder, *kinds]}
            for attributes in own_dicts(model, written.values()).values():
                attributes[place[-1]] = value

    def _changes(self, library: Library, plan: Plan) -> dict[Place, int]:
        """Values of the entries that follow what a plan removes."""
        changes = {**library.stated}
        entries = library.entries()
        choices = {choice.name: choice for choice in plan.groups}
        for one in self._known.get(frozenset(choices), ()):
            choice = choices[one.kinds[0].groups[0]]
            left = choice.size - len(choice.removed)
            for place in one.places if left < choice.size else ():
                changes[place] = changes.get(place, entries[place]) * left // choice.size
        return changes


def _kinds(graph: CouplingGraph) -> list[_Kind]:
    """Structures of one kind and size in one stack, which lose equally many units."""
    found: dict[tuple[str, str, int], list[str]] = {}
    for part in find_structures(graph).structures:
        stack = part.layer.rpartition(".")[0] if part.layer else part.group
        found.setdefault((part.kind, stack, part.size), []).append(part.group)
    return [
        _Kind(kind, tuple(names), tuple(graph.group(name).units for name in names))
        for (kind, _, _), names in found.items()
    ]


def _together(kinds: Sequence[_Kind]) -> Iterator[tuple[_Kind, ...]]:
    """Kinds that one number may state: two, those of one name (heads of both stacks), and these
    with the residual width.
    """
    yield from combinations(kinds, 2)
    for name in dict.fromkeys(kind.name for kind in kinds):
        alike = tuple(kind for kind in kinds if kind.name == name)
        if len(alike) > 2:
            yield alike
        for hidden in (kind for kind in kinds if kind.name == "hidden" != name):
            if len(alike) > 1:
                yield (hidden, *alike)


def _from_the_middle(size: int) -> Iterator[int]:
    """1 … size - 1, those near the half first.

    >>> list(_from_the_middle(6))
    [3, 2, 4, 1, 5]
    """
    yield from sorted(range(1, size), key=lambda count: (abs(2 * count - size), count))


def _rules(library: Library, found: Sequence[_Expressed]) -> Iterator[Constraint]:
    """What the library demands of entries that shrink apart."""
    entries = library.entries()

    def entry(place: Place) -> Proportional:
        sets = tuple(one.kinds[0].sets[0] for one in found if place in one.places)
        return Proportional(place[-1], entries[place], sets)

    for multiple, divisor in sorted(library.divisors()):
        width, by = entry(multiple), entry(divisor)
        if [*map(id, width.sets)] != [*map(id, by.sets)]:
            reason = f"{library.name} demands a {width.name} that is a multiple of its {by.name}"
            yield Divisible(width, by, reason)


def _preferred(found: Sequence[_Expressed]) -> Iterator[Preferred]:
    """Multiples of 16 for hidden and FFN widths, of less where they are below 128."""
    for kind in (kind for one in found for kind in one.kinds if kind.name in ("hidden", "ffn")):
        multiple = MULTIPLE
        while multiple > 1 and kind.size < 8 * multiple:
            multiple //= 2
        why = "kernels are fast at multiples of 16"
        yield from (Preferred(name, multiple, why) for name in kind.groups if multiple > 1)


def _follow(model: nn.Module, built: nn.Module, known: Sequence[Edit]) -> Iterator[Edit]:
    """Integers of modules and configs that the library sets otherwise when it builds the result."""
    modules = dict(model.named_modules(remove_duplicate=False))
    seen = {_holder(modules[edit.module], edit.attribute) for edit in known}
    for path, theirs in built.named_modules(remove_duplicate=False):
        for attribute, value in _settings(vars(theirs)):
            before = value_of(modules[path], attribute)
            after = tuple(value) if isinstance(value, list) else value
            if before is None or before == after or not kind_of_edit(attribute, before, after):
                continue
            holder = _holder(modules[path], attribute)
            if holder not in seen:
                seen.add(holder)
                yield Edit(path, attribute, before, after)


def _holder(module: nn.Module, attribute: str) -> tuple[int, str]:
    """Which entry of which object it is: modules may share a config."""
    return id(holders_of(module, attribute)[-1]), attribute.rpartition(".")[2]


def _settings(attributes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in attributes.items():
        if name.startswith("_"):
            continue
        if is_config(value) and prefix.count(".") < 3:
            yield from _settings(vars(value), f"{prefix}{name}.")
        elif type(value) in (int, tuple, list):
            yield f"{prefix}{name}", value


@checks_options
def fitting_config(model: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    """The config from which the library builds the cut model, with the same answers.

    Parameters
    ----------
    kwargs
        Inputs for the comparison.

    Raises
    ------
    ModelError
        If there is none; the message names tensors that the library would build otherwise, or
        how far its answers are off.
    """
    plan = applied_plan(model)
    library = Library(model)
    changes = _search(library, model, frozenset() if plan is None else _pairs(plan), kwargs)
    for place, value in changes.items():
        write(library.config, place, value)
    return library.config


def _trials(graph: CouplingGraph, one: _Expressed) -> Iterator[Mask]:
    """A few choices that remove the same share of all of its groups."""
    tied = replace(graph, constraints=(*graph.constraints, one.tie))
    scores = np.full(graph.unit_count + 1, np.inf)
    scores[np.concatenate(one.tie.sets)] = 1.0
    for count in islice(_from_the_middle(one.step), _TRIALS):
        kept = select(tied, scores, {}, ratios=count / one.step).kept
        if not kept.all() and len({kept[units].mean() for units in one.tie.sets}) == 1:
            yield kept


def _search(
    library: Library, cut: nn.Module, pairs: Pairs, kwargs: Mapping[str, Any]
) -> dict[Place, int]:
    return library.search(
        shapes_of(cut), pairs, lambda changes: library.gap(changes, cut, kwargs), CLOSE
    )


def _pairs(plan: Plan) -> Pairs:
    after = plan.resulting_shapes()
    dims = {
        pair for name, shape in plan.shapes.items() for pair in zip(shape, after[name], strict=True)
    }
    groups = {(choice.size, choice.size - len(choice.removed)) for choice in plan.groups}
    return frozenset((a, b) for a, b in dims | groups if 0 < b < a)
